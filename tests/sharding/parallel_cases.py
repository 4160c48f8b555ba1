"""DeepSpeed's other kinds of parallelism on 4 ranks: experts, sequences and pipelines.

They cut a model along process groups of their own. On every rank a yardstick, ALTO on whole
tensors, takes the same steps for the parameters that the rank has, whole as DeepSpeed's own
``safe_get_full_*`` functions put them together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)
from torch import Tensor, nn

import alto_ds
from alto_ds import states
from tests.sharding.harness import Case, bare, deviation, ratio_deviation
from tests.sharding.pieces import FLAT_LISTS

STEPS, BATCH, VOCABULARY, WIDTH, LENGTH = 20, 16, 37, 12, 8
SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "betas": [0.9, 0.9, 0.99],
    "alpha": -5.0,
    "weight_decay": 0.1,
}
STATES = (states.EXP_AVG_GRAD, states.EXP_AVG, states.EXP_AVG_SQ)


@dataclass(frozen=True, kw_only=True)
class ParallelCase(Case):
    """A kind of parallelism, which is the function that measures it, and how ZeRO cuts.

    Attributes:
        stage: of ZeRO.
        config: further keys of the JSON.
        wrapper: name of the class that DeepSpeed must wrap the optimizer in.
    """

    stage: int
    config: dict[str, Any] = field(default_factory=dict)
    wrapper: str = "DeepSpeedZeroOptimizer"

    def json(self, **more: Any) -> dict[str, Any]:
        """A DeepSpeed configuration without clipping, so that gradients arrive as they are."""
        return (
            {
                "train_batch_size": BATCH,
                "optimizer": {"type": "ALTO", "params": SETTINGS},
                "gradient_clipping": 0.0,
                "steps_per_print": 10**9,
                "zero_optimization": {
                    "stage": self.stage,
                    "stage3_param_persistence_threshold": 0,
                },
            }
            | self.config
            | more
        )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[BATCH, LENGTH]`` and targets of the same shape."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return tokens, torch.roll(tokens, 1, 1)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """A residual layer of 3 tanh units for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Experts(nn.Module):
    """A dense layer and 4 experts, 2 on each rank of an expert-parallel group of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.moe = MoE(WIDTH, Block(), num_experts=4, ep_size=2, k=1, use_rts=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden, balance, _ = self.moe(self.embedding(tokens))
        return self.head(hidden), balance


class Attention(nn.Module):
    """Self-attention over a sequence of which each rank of a group has a part (Ulysses)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.attend: Any = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.attend is None:
            self.attend = DistributedAttention(attention, groups._get_sequence_parallel_group())
        hidden = self.embedding(tokens)
        # [batch, length / ranks, heads, features of a head]
        query, key, value = self.qkv(hidden).unflatten(-1, (3, 4, WIDTH // 4)).unbind(2)
        mixed = self.attend(query, key, value, 0)
        return self.head(hidden + mixed.flatten(2))


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """Causal attention on ``[batch, length, heads, features]``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2)


def whole(param: Any, engine: Any, key: str | None = None) -> Tensor:
    """A copy of all of a parameter or of one of its states, in fp32."""
    if hasattr(param, "_hp_mapping"):
        value = whole_state(param, engine, key) if key else safe_get_full_fp32_param(param)
    elif hasattr(param, "ds_id"):
        value = (
            safe_get_full_optimizer_state(param, key) if key else safe_get_full_fp32_param(param)
        )
    else:
        value = bare(engine).state[param][key] if key else param
    return value.detach().clone().float()


def whole_state(param: Any, engine: Any, key: str) -> Tensor:
    """As ``safe_get_full_optimizer_state``, which in ZeRO-1 and 2 knows the first group only."""
    flats, members = FLAT_LISTS[type(engine.optimizer).__name__]
    whole_value = torch.zeros(param.numel())
    for flat, group in zip(
        getattr(engine.optimizer, flats), getattr(engine.optimizer, members), strict=True
    ):
        if any(member is param for member in group) and param._hp_mapping is not None:
            there, here = (
                slice(address.start, address.start + address.numel)
                for address in (
                    param._hp_mapping.lp_fragment_address,
                    param._hp_mapping.hp_fragment_address,
                )
            )
            whole_value[there] = bare(engine).state[flat][key][here]
    dist.all_reduce(whole_value, group=param._dp_group)
    return whole_value.view_as(param)


def straddles(param: Any) -> bool:
    """Whether this rank's optimizer has only a part of the parameter, as DeepSpeed tells."""
    if hasattr(param, "ds_id"):
        return True
    if not hasattr(param, "_hp_mapping"):
        return False
    mapping = param._hp_mapping
    return mapping is None or mapping.lp_fragment_address.numel < param.numel()


def measure(engine: Any, train: Callable[[int], float]) -> dict[str, Any]:
    """Train by ``train(step)``, which returns the loss, beside the yardstick."""
    optimizer = bare(engine)
    params = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    own = {n: nn.Parameter(whole(p, engine)) for n, p in params.items()}
    initial = {n: p.detach().clone() for n, p in own.items()}
    yardstick = alto_ds.ALTO(list(own.items()), **SETTINGS)
    take_step = engine.optimizer.step

    def step_beside_yardstick(*arguments: Any, **options: Any) -> Any:
        for name, param in params.items():
            own[name].grad = safe_get_full_grad(param).detach().clone().float()
        yardstick.step()
        return take_step(*arguments, **options)

    engine.optimizer.step = step_beside_yardstick
    losses = [train(step) for step in range(STEPS)]
    engine.optimizer.step = take_step
    expected = {name: param.detach() for name, param in own.items()}
    found_states = {key: {n: whole(p, engine, key) for n, p in params.items()} for key in STATES}
    return {
        "wrapper": type(engine.optimizer).__name__,
        "losses": losses,
        "moved": deviation(expected, initial),
        "masters": deviation({n: whole(p, engine) for n, p in params.items()}, expected),
        "states": {
            key: deviation(found, {n: yardstick.state[p][key] for n, p in own.items()})
            for key, found in found_states.items()
        },
        "ratios": ratio_deviation(
            optimizer.trust_ratios(engine.module.named_parameters()), yardstick.trust_ratios()
        ),
        "straddling": [n for n, p in params.items() if straddles(p)],
    }


def run_moe(case: ParallelCase, _: Path) -> dict[str, Any]:
    """Experts' gradients are averaged over 2 ranks, all others over 4."""
    torch.manual_seed(1234)
    model = Experts()
    for index, expert in enumerate(model.moe.deepspeed_moe.experts.deepspeed_experts):
        torch.manual_seed(dist.get_rank() % 2 * 2 + index)
        for param in expert.parameters():
            nn.init.normal_(param, std=0.3)
    param_groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=param_groups, config=case.json()
    )
    size, rank = BATCH // 4, dist.get_rank()

    def train(step: int) -> float:
        tokens, targets = (part[rank * size : (rank + 1) * size] for part in batch(step))
        logits, balance = engine(tokens)
        loss = loss_of(logits, targets) + 0.01 * balance
        engine.backward(loss)
        engine.step()
        return loss.item()

    result = measure(engine, train)
    engine.destroy()
    return result


def run_pipeline(case: ParallelCase, _: Path) -> dict[str, Any]:
    """Two stages of two ranks; the first and the last layer share the embedding."""
    torch.manual_seed(1234)

    def project(layer: nn.Embedding, hidden: Tensor) -> Tensor:
        return hidden @ layer.weight.T

    model = PipelineModule(
        layers=[
            TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH),
            LayerSpec(Block),
            LayerSpec(nn.LayerNorm, WIDTH),
            LayerSpec(Block),
            TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH, forward_fn=project),
        ],
        topology=PipeDataParallelTopology(num_pp=2, num_dp=2),
        loss_fn=loss_of,
        partition_method="uniform",
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config=case.json(train_micro_batch_size_per_gpu=4),
    )
    size = BATCH // 2
    data_rank = engine.grid.get_data_parallel_rank()

    def train(step: int) -> float:
        own = (part[data_rank * size : (data_rank + 1) * size] for part in batch(step))
        return engine.train_batch(iter(zip(*(part.split(4) for part in own), strict=True))).item()

    result = measure(engine, train)
    (tied,) = [n for n, _ in engine.module.named_parameters() if "embedding" in n]
    ratio = bare(engine).trust_ratios(engine.module.named_parameters())[tied]
    weight = dict(engine.module.named_parameters())[tied].detach().double()
    result["tied"] = [*ratio, weight.sum().item(), weight.abs().max().item()]
    result["stage"] = engine.grid.get_pipe_parallel_rank()
    engine.destroy()
    return result


def run_ulysses(case: ParallelCase, _: Path) -> dict[str, Any]:
    """Two parts of the sequence on each of two parts of the batch; ZeRO shards over all four."""
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(sequence_parallel_size=2)
    torch.manual_seed(1234)
    model = Attention()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        mpu=parallel_state_sp,
        config=case.json(train_micro_batch_size_per_gpu=BATCH // 2),
    )
    data_rank, part = divmod(dist.get_rank(), 2)
    rows = slice(data_rank * BATCH // 2, (data_rank + 1) * BATCH // 2)
    columns = slice(part * LENGTH // 2, (part + 1) * LENGTH // 2)

    def train(step: int) -> float:
        tokens, targets = (x[rows, columns] for x in batch(step))
        loss = loss_of(engine(tokens), targets)
        engine.backward(loss)
        engine.step()
        return loss.item()

    result = measure(engine, train)
    engine.destroy()
    return result


BF16_OPTIMIZER: dict[str, Any] = {
    "config": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "wrapper": "BF16_Optimizer",
}

CASES: dict[str, ParallelCase] = {
    "moe-zero0": ParallelCase(measures=run_moe, stage=0, wrapper="ALTO"),
    "moe-zero1": ParallelCase(measures=run_moe, stage=1),
    "moe-zero1-bf16": ParallelCase(measures=run_moe, stage=1, **BF16_OPTIMIZER),
    "moe-zero2": ParallelCase(measures=run_moe, stage=2),
    "ulysses-zero1": ParallelCase(measures=run_ulysses, stage=1),
    "ulysses-zero2": ParallelCase(measures=run_ulysses, stage=2),
    "ulysses-zero3": ParallelCase(
        measures=run_ulysses, stage=3, wrapper="DeepSpeedZeroOptimizer_Stage3"
    ),
    "pipeline-zero0": ParallelCase(measures=run_pipeline, stage=0, wrapper="ALTO"),
    "pipeline-zero1": ParallelCase(measures=run_pipeline, stage=1),
    "pipeline-zero1-bf16": ParallelCase(measures=run_pipeline, stage=1, **BF16_OPTIMIZER),
}
