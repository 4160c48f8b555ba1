"""One of 4 ranks of PyTorch's own sharding, without DeepSpeed; all cases in one launch by torchrun.

A small model trains under ``fully_shard`` (FSDP2) or ``parallelize_module``. Gradients are gathered
into whole tensors and given to the yardstick, the same optimizer in one process. Rank 0 writes the
largest differences of parameters, states and trust ratios as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
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
from alto_ds.layout import Fragment, Layout

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


def shard_blocks(model: Model, **options: Any) -> Model:
    """FSDP2 in two units, one of them nested in the other."""
    fully_shard(model.uneven, **options)
    fully_shard(model, **options)
    return model


def tensor_parallel(model: Model, mesh: Any) -> Model:
    """Cut by rows, by columns and by the vocabulary; LayerNorm's gradient is left as summands."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "column": ColwiseParallel(input_layouts=Shard(1)),
        "row": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return model


def one_dimension() -> Any:
    return init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))


def two_dimensions(first: str, second: str) -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(first, second))


def fsdp_with_tensor_parallel(model: Model) -> Model:
    mesh = two_dimensions("dp", "tp")
    return shard_blocks(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])


class Naive(alto_ds.ALTO):
    """What any layer-wise optimizer does that takes the local part of a DTensor for a layer."""

    def _shards(self) -> Any:
        return [
            shard._replace(
                layout=Layout(
                    (alto_ds.layout.Layer(shard.tensor, shard.layout.layers[0].name),),
                    (Fragment(0, 0, shard.grad.numel(), 0),),
                )
            )
            for shard in super()._shards()
        ]


def e_over_adamw(params: Any, **_: Any) -> alto_ds.E:
    return alto_ds.E(torch.optim.AdamW(params, lr=0.02, weight_decay=0.1), alpha=-5.0, beta=0.9)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained.

    Attributes:
        shard: cuts the model.
        data_ranks: number of parts of the global batch.
        dtype: of the model's parameters.
        shard_last: make the optimizer first and then put the DTensors in its groups, as Hugging
            Face Accelerate does.
        make: makes the optimizer from the model's groups.
        yardstick: makes that of the unsharded twin.
    """

    shard: Callable[[Model], Model]
    data_ranks: int = 4
    shard_last: bool = False
    dtype: torch.dtype = torch.float32
    make: Callable[..., Optimizer] = alto_ds.ALTO
    yardstick: Callable[..., Optimizer] = alto_ds.ALTO


alto_with_bf16_states = functools.partial(alto_ds.ALTO, state_dtype="bf16")

CASES = {
    "fsdp2": Case(shard=lambda m: shard_blocks(m, mesh=one_dimension())),
    "fsdp2-fp64": Case(shard=lambda m: shard_blocks(m, mesh=one_dimension()), dtype=torch.float64),
    "fsdp2-bf16": Case(
        shard=lambda m: shard_blocks(
            m,
            mesh=one_dimension(),
            mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        )
    ),
    "fsdp2-offload": Case(
        shard=lambda m: shard_blocks(
            m, mesh=one_dimension(), offload_policy=CPUOffloadPolicy(pin_memory=False)
        )
    ),
    "fsdp2-bf16-states": Case(
        shard=lambda m: shard_blocks(m, mesh=one_dimension()),
        make=alto_with_bf16_states,
        yardstick=alto_with_bf16_states,
    ),
    "hsdp": Case(shard=lambda m: shard_blocks(m, mesh=two_dimensions("replicate", "shard"))),
    "tp": Case(shard=lambda m: tensor_parallel(m, init_device_mesh("cpu", (4,))), data_ranks=1),
    "fsdp2-tp": Case(shard=fsdp_with_tensor_parallel, data_ranks=2),
    "e-fsdp2": Case(
        shard=lambda m: shard_blocks(m, mesh=one_dimension()),
        make=e_over_adamw,
        yardstick=e_over_adamw,
    ),
    "e-tp": Case(
        shard=lambda m: tensor_parallel(m, init_device_mesh("cpu", (4,))),
        data_ranks=1,
        make=e_over_adamw,
        yardstick=e_over_adamw,
    ),
    "fsdp2-after-optimizer": Case(
        shard=lambda m: shard_blocks(m, mesh=one_dimension()), shard_last=True
    ),
    "naive": Case(shard=lambda m: shard_blocks(m, mesh=one_dimension()), make=Naive),
}


def whole(tensor: Any) -> Tensor:
    """A copy of all of ``tensor``; all ranks must call this together."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def deviation(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


def train_step(model: Model, optimizer: Optimizer, case: Case, step: int) -> None:
    """Gradients of this rank's part of global batch ``step``."""
    size = BATCH // case.data_ranks
    first = dist.get_rank() * case.data_ranks // dist.get_world_size() * size
    tokens, targets = (part[first : first + size] for part in batch(step))
    optimizer.zero_grad()
    (model(tokens) - targets.to(case.dtype)).square().mean().backward()


class CountAllReduces:
    """Notes the bytes of each ``torch.distributed.all_reduce`` in a block."""

    def __enter__(self) -> list[int]:
        self.original, self.sent = dist.all_reduce, []  # type: ignore[var-annotated]
        dist.all_reduce = self
        return self.sent

    def __call__(self, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        self.sent.append(tensor.numel() * tensor.element_size())
        return self.original(tensor, *arguments, **options)

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self.original


def run_case(case: Case) -> dict[str, Any]:
    """Train, compare with the yardstick and return the largest differences."""
    twin = Model(case.dtype)
    model = Model(case.dtype)
    if not case.shard_last:
        case.shard(model)
    optimizer = case.make(model.groups(), **SETTINGS)
    if case.shard_last:
        case.shard(model)
        for group, sharded in zip(optimizer.param_groups, model.groups(), strict=True):
            group["params"] = [param for _, param in sharded["params"]]
    yardstick = case.yardstick(twin.groups(), **SETTINGS)
    gradient_error = 0.0
    for step in range(STEPS):
        train_step(model, optimizer, case, step)
        tokens, targets = batch(step)
        twin.zero_grad()
        (twin(tokens) - targets.to(case.dtype)).square().mean().backward()
        for param, right in zip(model.parameters(), twin.parameters(), strict=True):
            grad = whole(param.grad)
            assert right.grad is not None
            gradient_error = max(gradient_error, deviation(grad, right.grad))
            right.grad = grad
        with CountAllReduces() as sent:
            optimizer.step()
        yardstick.step()
    result: dict[str, Any] = {"gradients": gradient_error, "sent": sent}
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    result["parameters"] = max(deviation(whole(p), q) for p, q in pairs)
    result["states"] = max(
        deviation(whole(optimizer.state[p][key]), value)
        for p, q in pairs
        for key, value in yardstick.state[q].items()
        if torch.is_tensor(value) and value.ndim
    )
    if isinstance(optimizer, alto_ds.ALTO) and isinstance(yardstick, alto_ds.ALTO):
        ratios = optimizer.trust_ratios()
        result["ratios"] = max(
            abs(ratios[name].ratio / right.ratio - 1)
            for name, right in yardstick.trust_ratios().items()
        )
    sizes = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sizes)
    result["local_sizes"] = everyone
    return result


def run_checkpoint() -> dict[str, Any]:
    """Save under FSDP2 on 4 ranks, go on under HSDP on 2 × 2; both ways on must be the same."""
    folder = os.path.join(os.path.dirname(sys.argv[1]), "checkpoint")
    case, other = CASES["fsdp2"], CASES["hsdp"]
    model = case.shard(Model())
    optimizer = alto_ds.ALTO(model.groups(), **SETTINGS)
    for step in range(6):
        if step == 3:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
        train_step(model, optimizer, case, step)
        optimizer.step()

    resumed = other.shard(Model())
    resumed_optimizer = alto_ds.ALTO(resumed.groups(), **SETTINGS)
    weights, states = get_state_dict(resumed, resumed_optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=states)
    for step in range(3, 6):
        train_step(resumed, resumed_optimizer, other, step)
        resumed_optimizer.step()
    pairs = list(zip(resumed.parameters(), model.parameters(), strict=True))
    return {
        "parameters": max(deviation(whole(p), whole(q)) for p, q in pairs),
        "states": max(
            deviation(whole(resumed_optimizer.state[p][k]), whole(optimizer.state[q][k]))
            for p, q in pairs
            for k in ("exp_avg_grad", "exp_avg", "exp_avg_sq")
        ),
        "steps": sorted({state["step"] for state in resumed_optimizer.state.values()}),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda case=case: run_case(case)  # type: ignore[misc]
        for name, case in CASES.items()
    }
    for name, run in (runs | {"checkpoint": run_checkpoint}).items():
        try:
            results[name] = run()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    results["imported_deepspeed"] = "deepspeed" in sys.modules
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
