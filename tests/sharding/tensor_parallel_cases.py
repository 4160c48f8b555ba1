"""Tensor parallelism 2 × data parallelism 2: megatron-core's layers, and DeepSpeed's AutoTP.

A twin has the same weights in plain PyTorch modules, in one process, and takes the same steps on
the whole global batch. megatron-core and transformers are imported by the cases that need them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import GatherReplacedLayerParams, TensorParallel_Layer
from deepspeed.utils import groups
from torch import Tensor, nn

import alto_ds
from alto_ds import megatron
from tests.sharding.harness import Case, NaiveALTO, bare, deviation, ratio_deviation

VOCABULARY, WIDTH, BATCH, STEPS = 64, 12, 16, 10
SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "betas": [0.9, 0.9, 0.99],
    "alpha": -5.0,
    "weight_decay": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class TensorParallelCase(Case):
    """How ZeRO cuts what tensor parallelism has cut, and which optimizer steps.

    Attributes:
        stage: of ZeRO.
        optimizer_type: the JSON's optimizer type.
        bf16: train in bf16.
    """

    stage: int
    optimizer_type: str = "ALTO"
    bf16: bool = False

    def json(self, **more: Any) -> dict[str, Any]:
        """A DeepSpeed configuration without clipping, as the twin trains."""
        return {
            "train_micro_batch_size_per_gpu": BATCH // 2,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": self.optimizer_type, "params": SETTINGS},
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,
            "bf16": {"enabled": self.bf16},
            "steps_per_print": 10**9,
        } | more


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[BATCH, 8]`` and targets of the same shape."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, 8), generator=generator)
    return tokens, (tokens.float() / 10).sin()


class Twin:
    """Plain modules with their own ALTO, which train on whole batches."""

    def __init__(self, module: Any, loss_of: Any) -> None:
        self.module = module
        self.losses: list[float] = []
        self.optimizer = alto_ds.ALTO(module.named_parameters(), **SETTINGS)
        self._loss_of = loss_of

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """Take one step on a global batch."""
        self.optimizer.zero_grad()
        loss = self._loss_of(self.module, tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def compare(engine: Any, twin: Twin, loss_of: Any, data_group: Any, data_rank: int) -> list[float]:
    """Train engine and twin; return the largest relative difference of the losses of each step."""
    own = slice(data_rank * BATCH // 2, (data_rank + 1) * BATCH // 2)
    errors = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        loss = loss_of(engine, tokens[own], targets[own])
        engine.backward(loss)
        engine.step()
        twin.step(tokens, targets)
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=data_group)
        mean /= dist.get_world_size(data_group)
        errors.append(abs(mean.item() / twin.losses[-1] - 1))
    return errors


def differences(engine: Any, weights: dict[str, Tensor], twin: Twin) -> dict[str, Any]:
    """The largest relative differences between the engine's model and the twin."""
    optimizer = bare(engine)
    result: dict[str, Any] = {
        "weights": deviation(
            weights, {name: p.detach() for name, p in twin.module.named_parameters()}
        ),
        "steps": sorted({state["step"] for state in optimizer.state.values()}),
    }
    if not isinstance(optimizer, NaiveALTO):
        ratios = optimizer.trust_ratios(engine.module.named_parameters())
        result["ratios"] = ratio_deviation(ratios, twin.optimizer.trust_ratios())
    return result


class Whole(nn.Module):
    """Embedding, two linear layers and the rest, in plain modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.column = nn.Linear(WIDTH, 4 * WIDTH)
        self.row = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.row(torch.tanh(self.column(self.embedding(tokens))))
        return self.head(self.norm(hidden)).squeeze(-1)


class Parallel(nn.Module):
    """The same by megatron-core, with the same names; norm and head are replicated."""

    def __init__(self) -> None:
        super().__init__()
        from megatron.core import ModelParallelConfig, tensor_parallel

        config = ModelParallelConfig(
            tensor_model_parallel_size=2, use_cpu_initialization=True, params_dtype=torch.float32
        )
        options: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_uniform_}
        self.embedding = tensor_parallel.VocabParallelEmbedding(VOCABULARY, WIDTH, **options)
        self.column = tensor_parallel.ColumnParallelLinear(
            WIDTH, 4 * WIDTH, gather_output=False, **options
        )
        self.row = tensor_parallel.RowParallelLinear(
            4 * WIDTH, WIDTH, bias=True, input_is_parallel=True, skip_bias_add=False, **options
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = self.row(torch.tanh(self.column(hidden)[0]))[0]
        return self.head(self.norm(hidden)).squeeze(-1)


def whole_weights(module: nn.Module, group: Any) -> dict[str, Tensor]:
    """All parameters, the parts of marked ones joined along their partition dimension.

    All ranks of the tensor-parallel ``group`` must call this together.
    """
    weights = {}
    for name, param in module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            value = param.detach().clone()
        if getattr(param, "tensor_model_parallel", False):
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, value, group=group)
            value = torch.cat(parts, getattr(param, "partition_dim"))  # noqa: B009  unknown to mypy
        weights[name] = value.float()
    return weights


def run_megatron(case: TensorParallelCase, _: Path) -> dict[str, Any]:
    """megatron-core's layers under DeepSpeed."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.manual_seed(1234 + dist.get_rank(group))
    model = Parallel()
    for part in (model.norm, model.head):  # replicated: the same on all ranks
        for param in part.parameters():
            dist.broadcast(param.data, 0)
    whole = Whole()
    whole.load_state_dict(whole_weights(model, group))

    def loss_of(module: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        return (module(tokens) - targets).square().mean()

    twin = Twin(whole, loss_of)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        mpu=megatron.mpu(),
        config=case.json(),
    )
    data_group = parallel_state.get_data_parallel_group()
    losses = compare(engine, twin, loss_of, data_group, dist.get_rank(data_group))
    result = differences(engine, whole_weights(engine.module, group), twin)
    engine.destroy()
    return result | {"loss": max(losses)}


def run_autotp(case: TensorParallelCase, _: Path) -> dict[str, Any]:
    """DeepSpeed cuts a model of transformers by itself; row-parallel biases stay whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1234)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    )
    whole: Any = LlamaForCausalLM(config)
    for name, param in whole.named_parameters():
        if "bias" in name:
            nn.init.normal_(param, std=0.1)
    model = copy.deepcopy(whole)

    def loss_of(module: Any, tokens: Tensor, _: Tensor) -> Tensor:
        return module(tokens, labels=tokens).loss

    twin = Twin(whole, loss_of)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=case.json(tensor_parallel={"autotp_size": 2}),
    )
    data_group = groups._get_data_parallel_group()
    losses = compare(engine, twin, loss_of, data_group, dist.get_rank(data_group))
    weights = {}
    for prefix, module in engine.module.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False))
        cut = isinstance(module, TensorParallel_Layer)
        with GatherReplacedLayerParams(list(own.values()), module, enabled=cut):
            weights.update({name: param.detach().clone() for name, param in own.items()})
    result = differences(engine, weights, twin)
    result["cut"] = sum(hasattr(p, "tensor_model_parallel") for p in engine.module.parameters())
    engine.destroy()
    return result | {"loss": max(losses)}


AUTOTP: dict[str, Any] = {"measures": run_autotp, "needs": "transformers"}
MEGATRON: dict[str, Any] = {"measures": run_megatron, "needs": "megatron-core"}

CASES: dict[str, TensorParallelCase] = {
    "autotp-zero0": TensorParallelCase(**AUTOTP, stage=0),
    "autotp-zero1": TensorParallelCase(**AUTOTP, stage=1),
    "autotp-zero2": TensorParallelCase(**AUTOTP, stage=2),
    "megatron-zero0": TensorParallelCase(**MEGATRON, stage=0),
    "megatron-zero1": TensorParallelCase(**MEGATRON, stage=1),
    "megatron-zero2": TensorParallelCase(**MEGATRON, stage=2),
    "megatron-zero3": TensorParallelCase(**MEGATRON, stage=3),
    "megatron-zero0-bf16": TensorParallelCase(**MEGATRON, stage=0, bf16=True),
    "megatron-naive": TensorParallelCase(**MEGATRON, stage=1, optimizer_type="NaiveALTO"),
}
