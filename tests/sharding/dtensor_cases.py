"""PyTorch's own parallelism, without DeepSpeed: FSDP2, DTensor's tensor parallelism, DDP.

A small model trains under ``fully_shard`` or ``parallelize_module``. Gradients are gathered into
whole tensors and given to the yardstick, the same optimizer in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import Optimizer

import alto_ds
from tests.sharding.harness import (
    AllReduceCounter,
    Case,
    NaiveALTO,
    deviation,
    ratio_deviation,
)
from tests.sharding.linear_model import LinearModel, Yardstick

STEPS, BATCH, VOCABULARY, WIDTH = 20, 16, 36, 8
SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.9, 0.9, 0.99),
    "alpha": -5.0,
    "weight_decay": 0.1,
}


class Model(nn.Module):
    """Layers that 4 ranks cannot share evenly, and one of a single row."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1234)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.column = nn.Linear(WIDTH, 4 * WIDTH)
        self.row = nn.Linear(4 * WIDTH, WIDTH)
        self.uneven = nn.Linear(WIDTH, 7)
        self.head = nn.Linear(7, 1)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        hidden = self.row(torch.tanh(self.column(hidden)))
        return self.head(torch.tanh(self.uneven(hidden))).squeeze(-1)

    def groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, the rest without."""
        named = list(self.named_parameters())
        return [
            {"params": [(n, p) for n, p in named if "weight" in n and "norm" not in n]},
            {
                "params": [(n, p) for n, p in named if "bias" in n or "norm" in n],
                "weight_decay": 0.0,
                "trust_ratio": True,
            },
        ]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[BATCH, 4]`` and targets of the same shape."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, 4), generator=generator)
    return tokens, (tokens.float() / 10).sin()


def one_dimension() -> Any:
    return init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))


def two_dimensions(first: str, second: str) -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(first, second))


def fsdp2(model: Model, mesh: Any = None, **options: Any) -> None:
    """Cut in two units, one of them nested in the other."""
    mesh = one_dimension() if mesh is None else mesh
    fully_shard(model.uneven, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def hsdp(model: Model) -> None:
    """Two replicas of two parts."""
    fsdp2(model, two_dimensions("replicate", "shard"))


def tensor_parallel(model: Model, mesh: Any = None) -> None:
    """Cut by rows, by columns and by the vocabulary; LayerNorm's gradient is left as summands."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "column": ColwiseParallel(input_layouts=Shard(1)),
        "row": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, init_device_mesh("cpu", (4,)) if mesh is None else mesh, plan)


def fsdp2_with_tensor_parallel(model: Model) -> None:
    mesh = two_dimensions("dp", "tp")
    tensor_parallel(model, mesh["tp"])
    fsdp2(model, mesh["dp"])


def e_over_adamw(params: Any, **_: Any) -> alto_ds.E:
    return alto_ds.E(torch.optim.AdamW(params, lr=0.02, weight_decay=0.1), alpha=-5.0, beta=0.9)


@dataclass(frozen=True, kw_only=True)
class DTensorCase(Case):
    """What is trained.

    Attributes:
        shard: cuts the model.
        data_ranks: number of parts of the global batch.
        dtype: of the model's parameters.
        half: whether the model computes in bf16.
        shard_last: make the optimizer first and then put the DTensors in its groups, as Hugging
            Face Accelerate does.
        uneven: whether some rank must be proven to hold nothing of a layer.
        make: makes the optimizer from the model's groups.
        yardstick: makes that of the unsharded twin.
        sent: bytes of each all-reduce that a step must make; None where these are not checked.
    """

    shard: Callable[[Model], None] = fsdp2
    data_ranks: int = 4
    dtype: torch.dtype = torch.float32
    half: bool = False
    shard_last: bool = False
    uneven: bool = False
    make: Callable[..., Optimizer] = alto_ds.ALTO
    yardstick: Callable[..., Optimizer] = alto_ds.ALTO
    sent: tuple[int, ...] | None = None


def whole(tensor: Any) -> Tensor:
    """A copy of all of ``tensor``; all ranks must call this together."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def whole_states(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All states of all layers that are as large as the layer; all ranks call this together."""
    return {
        f"{name} {key}": whole(value)
        for name, param in model.named_parameters()
        for key, value in sorted(optimizer.state[param].items())
        if torch.is_tensor(value) and value.ndim
    }


def whole_layers(model: nn.Module) -> dict[str, Tensor]:
    """All layers; all ranks must call this together."""
    return {name: whole(param) for name, param in model.named_parameters()}


def whole_grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all layers; all ranks must call this together."""
    return {name: whole(param.grad) for name, param in model.named_parameters()}


def make(case: DTensorCase) -> tuple[Model, Optimizer]:
    """The model, cut, and its optimizer."""
    model = Model(case.dtype)
    if not case.shard_last:
        case.shard(model)
    optimizer = case.make(model.groups(), **SETTINGS)
    if case.shard_last:
        case.shard(model)
        for group, sharded in zip(optimizer.param_groups, model.groups(), strict=True):
            group["params"] = [param for _, param in sharded["params"]]
    return model, optimizer


def backward(model: Model, dtype: torch.dtype, samples: slice, step: int) -> None:
    """Gradients of some samples of global batch ``step``."""
    tokens, targets = (part[samples] for part in batch(step))
    model.zero_grad()
    (model(tokens) - targets.to(dtype)).square().mean().backward()


def own_samples(case: DTensorCase) -> slice:
    """This rank's part of the global batch."""
    size = BATCH // case.data_ranks
    first = dist.get_rank() * case.data_ranks // dist.get_world_size() * size
    return slice(first, first + size)


def run_exact(case: DTensorCase, _: Path) -> dict[str, Any]:
    """Train, compare with the yardstick and return the largest differences."""
    twin = Model(case.dtype)
    model, optimizer = make(case)
    yardstick = case.yardstick(twin.groups(), **SETTINGS)
    counter = AllReduceCounter(optimizer)
    gradient_error = 0.0
    for step in range(STEPS):
        backward(model, case.dtype, own_samples(case), step)
        backward(twin, case.dtype, slice(BATCH), step)
        grads = whole_grads(model)
        gradient_error = max(gradient_error, deviation(grads, whole_grads(twin)))
        for name, param in twin.named_parameters():
            param.grad = grads[name]
        optimizer.step()
        yardstick.step()
    result: dict[str, Any] = {
        "gradients": gradient_error,
        "sent": counter.calls,
        "parameters": deviation(whole_layers(model), whole_layers(twin)),
        "states": deviation(whole_states(model, optimizer), whole_states(twin, yardstick)),
        "local_sizes": [
            param.to_local().numel() for param in model.parameters() if isinstance(param, DTensor)
        ],
    }
    if type(optimizer) is alto_ds.ALTO and isinstance(yardstick, alto_ds.ALTO):
        ratios = optimizer.trust_ratios(model.named_parameters())
        result["ratios"] = ratio_deviation(ratios, yardstick.trust_ratios())
    return result


def run_ddp(_: DTensorCase, __: Path) -> dict[str, Any]:
    """DistributedDataParallel, against the yardstick given the gradient of the whole batch."""
    model = LinearModel()
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = alto_ds.ALTO(model.groups(), **SETTINGS)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    yardstick = Yardstick(trained, functools.partial(alto_ds.ALTO, **SETTINGS))
    own = BATCH // dist.get_world_size()
    for step in range(STEPS):
        first = step * BATCH + dist.get_rank() * own
        model.zero_grad()
        ddp(range(first, first + own)).backward()
        used = {n for n, p in model.named_parameters() if p.grad is not None}
        samples = range(step * BATCH, (step + 1) * BATCH)
        grads = LinearModel.clipped_gradients(samples, float("inf"))
        yardstick.step(
            {name: grad for name, grad in grads.items() if name in used},
            [group["lr"] for group in optimizer.param_groups],
        )
        optimizer.step()
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"masters": deviation(found, yardstick.masters())}


def _bf16_states(params: Any, **settings: Any) -> alto_ds.ALTO:
    return alto_ds.ALTO(params, state_dtype="bf16", **settings)


def _fsdp2_bf16(model: Model) -> None:
    fsdp2(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def _fsdp2_offload(model: Model) -> None:
    fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


LAYERS, CUT_BY_TP = 11, 4  # parameters of the model, and those that tensor parallelism cuts
E: dict[str, Any] = {"make": e_over_adamw, "yardstick": e_over_adamw}

CASES: dict[str, DTensorCase] = {
    "fsdp2": DTensorCase(measures=run_exact, uneven=True, sent=(16 * LAYERS + 16,)),
    "fsdp2-fp64": DTensorCase(measures=run_exact, uneven=True, dtype=torch.float64),
    "fsdp2-bf16": DTensorCase(measures=run_exact, shard=_fsdp2_bf16, half=True),
    "fsdp2-offload": DTensorCase(measures=run_exact, shard=_fsdp2_offload),
    "fsdp2-bf16-states": DTensorCase(measures=run_exact, make=_bf16_states, yardstick=_bf16_states),
    "fsdp2-after-optimizer": DTensorCase(measures=run_exact, shard_last=True),
    "hsdp": DTensorCase(measures=run_exact, shard=hsdp, uneven=True, sent=(16 * LAYERS + 16,)),
    "tp": DTensorCase(
        measures=run_exact, shard=tensor_parallel, data_ranks=1, sent=(16 * CUT_BY_TP + 16,)
    ),
    "fsdp2-tp": DTensorCase(
        measures=run_exact,
        shard=fsdp2_with_tensor_parallel,
        data_ranks=2,
        uneven=True,
        sent=(16 * LAYERS + 16, 16 * CUT_BY_TP + 16),
    ),
    "e-fsdp2": DTensorCase(measures=run_exact, **E, sent=(4,)),
    "e-tp": DTensorCase(measures=run_exact, shard=tensor_parallel, data_ranks=1, **E),
    "fsdp2-naive": DTensorCase(measures=run_exact, uneven=True, make=NaiveALTO),
    "ddp": DTensorCase(measures=run_ddp, worlds=(2,)),
}
