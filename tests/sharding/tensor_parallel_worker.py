"""One rank of tensor parallelism 2 × data parallelism 2: megatron-core's layers, and AutoTP.

Run by torchrun on 4 ranks. The twin has the same weights in plain PyTorch modules, in one process,
and takes the same steps on the whole global batch. Rank 0 writes the largest differences as JSON.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import GatherReplacedLayerParams, TensorParallel_Layer
from deepspeed.utils import groups
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import alto_ds
from alto_ds import megatron
from tests.sharding.cases import NaiveALTO

VOCABULARY, WIDTH, BATCH, STEPS = 64, 12, 16, 10
SETTINGS = {"lr": 0.02, "betas": [0.9, 0.9, 0.99], "alpha": -5.0, "weight_decay": 0.1}


class Parallel(nn.Module):
    """Embedding, two linear layers cut between the ranks, and replicated rest."""

    def __init__(self) -> None:
        super().__init__()
        config = ModelParallelConfig(
            tensor_model_parallel_size=2, use_cpu_initialization=True, params_dtype=torch.float32
        )
        options: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_uniform_}
        self.embedding = VocabParallelEmbedding(VOCABULARY, WIDTH, **options)
        self.column = ColumnParallelLinear(WIDTH, 4 * WIDTH, gather_output=False, **options)
        self.row = RowParallelLinear(
            4 * WIDTH, WIDTH, bias=True, input_is_parallel=True, skip_bias_add=False, **options
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = self.row(torch.tanh(self.column(hidden)[0]))[0]
        return self.head(self.norm(hidden)).squeeze(-1)


class Whole(nn.Module):
    """The same in plain modules, with the same names."""

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


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """All parameters, the parts of marked ones joined along their partition dimension."""
    group = parallel_state.get_tensor_model_parallel_group()
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


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[BATCH, 8]`` and targets of the same shape."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, 8), generator=generator)
    return tokens, (tokens.float() / 10).sin()


def run_case(zero_stage: int, optimizer_type: str, bf16: bool) -> dict[str, Any]:
    """Train both and return the largest relative differences."""
    torch.manual_seed(1234 + parallel_state.get_tensor_model_parallel_rank())
    model = Parallel()
    for part in (model.norm, model.head):  # replicated: the same on all ranks
        for param in part.parameters():
            dist.broadcast(param.data, 0)
    twin = Whole()
    twin.load_state_dict(whole_weights(model))
    yardstick = alto_ds.ALTO(twin.named_parameters(), **SETTINGS)  # type: ignore[arg-type]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        mpu=megatron.mpu(),
        config={
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // 2,
            "optimizer": {"type": optimizer_type, "params": SETTINGS},
            "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        },
    )
    rank, size = parallel_state.get_data_parallel_rank(), BATCH // 2

    def loss_of(module: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        return (module(tokens) - targets).square().mean()

    losses = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        own = slice(rank * size, (rank + 1) * size)
        loss = loss_of(engine, tokens[own], targets[own])
        engine.backward(loss)
        engine.step()
        yardstick.zero_grad()
        twin_loss = loss_of(twin, tokens, targets)
        twin_loss.backward()
        yardstick.step()
        losses.append((loss.detach(), twin_loss.item()))
    group = parallel_state.get_data_parallel_group()
    result = compare(engine, whole_weights(engine.module), twin, yardstick, losses, group)
    engine.destroy()
    return result


def compare(
    engine: Any,
    weights: dict[str, Tensor],
    twin: nn.Module,
    yardstick: alto_ds.ALTO,
    losses: list[tuple[Tensor, float]],
    data_group: Any,
) -> dict[str, Any]:
    """The largest relative differences between the engine's model and the twin."""
    loss_error = 0.0
    for loss, twin_loss in losses:
        dist.all_reduce(loss, group=data_group)
        mean = loss.item() / dist.get_world_size(data_group)
        loss_error = max(loss_error, abs(mean - twin_loss) / twin_loss)
    weight_error = max(
        ((weights[name] - value.detach()).norm() / value.norm()).item()
        for name, value in twin.named_parameters()
    )
    optimizer = engine.optimizer
    alto = optimizer if isinstance(optimizer, alto_ds.ALTO) else optimizer.optimizer
    ratios = alto.trust_ratios(engine.module.named_parameters())
    ratio_error = max(
        abs(ratios[name].ratio - row.ratio) / row.ratio
        for name, row in yardstick.trust_ratios().items()
        if name in ratios  # the naive twin has fewer
    )
    return {
        "loss": loss_error,
        "weights": weight_error,
        "ratios": ratio_error,
        "steps": sorted({state["step"] for state in alto.state.values()}),
    }


def run_autotp(zero_stage: int) -> dict[str, Any]:
    """DeepSpeed cuts a model of transformers by itself; row-parallel biases stay whole."""
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
    twin: Any = LlamaForCausalLM(config)
    for name, param in twin.named_parameters():
        if "bias" in name:
            nn.init.normal_(param, std=0.1)
    yardstick = alto_ds.ALTO(twin.named_parameters(), **SETTINGS)  # type: ignore[arg-type]
    model = copy.deepcopy(twin)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": BATCH // 2,
            "gradient_accumulation_steps": 1,
            "tensor_parallel": {"autotp_size": 2},
            "optimizer": {"type": "ALTO", "params": SETTINGS},
            "zero_optimization": {"stage": zero_stage},
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        },
    )
    rank, size = dist.get_rank() // 2, BATCH // 2
    losses = []
    for step in range(STEPS):
        tokens, _ = batch(step)
        own = tokens[rank * size : (rank + 1) * size]
        loss = engine(own, labels=own).loss
        engine.backward(loss)
        engine.step()
        yardstick.zero_grad()
        twin_loss = twin(tokens, labels=tokens).loss
        twin_loss.backward()
        yardstick.step()
        losses.append((loss.detach(), twin_loss.item()))
    weights = {}
    for prefix, module in engine.module.named_modules():
        own_params = dict(module.named_parameters(prefix, recurse=False))
        cut = isinstance(module, TensorParallel_Layer)
        with GatherReplacedLayerParams(list(own_params.values()), module, enabled=cut):
            weights.update({name: p.detach().clone() for name, p in own_params.items()})
    group = groups._get_data_parallel_group()
    result = compare(engine, weights, twin, yardstick, losses, group)
    result["cut"] = sum(hasattr(p, "tensor_model_parallel") for p in engine.module.parameters())
    engine.destroy()
    return result


def main() -> None:
    torch.set_num_threads(1)
    torch.optim.NaiveALTO = NaiveALTO  # type: ignore[attr-defined]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}

    def note(name: str, run: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        try:
            results[name] = run(*arguments)
        except Exception:
            results[name] = {"error": traceback.format_exc()}

    for stage in range(3):
        note(f"autotp-zero{stage}", run_autotp, stage)
    groups.mesh_device = None  # DeepSpeed keeps AutoTP's, and would prefer it to an mpu
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    for stage in range(4):
        note(f"zero{stage}", run_case, stage, "ALTO", False)
    note("zero0-bf16", run_case, 0, "ALTO", True)
    note("naive", run_case, 1, "NaiveALTO", False)

    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
