"""What is to be trained, and on how many GPUs? All that a plan is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from alto_ds.plan.activations import meta_model
from alto_ds.pretrain.model import flops_per_token, parameter_groups
from alto_ds.pretrain.settings import ModelSettings
from alto_ds.registration import fill_in_auto
from alto_ds.states import EXP_AVG, EXP_AVG_SQ, dtype_of, names

PLANNED_OPTIMIZERS = ("ALTO", "Adam", "AdamW")
NOT_PLANNED = ("zenflow", "offload_param", "zero_hpz_partition_size", "zero_quantized_weights")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run on so many ranks, one for each GPU.

    Attributes:
        model: settings of the model.
        vocab_size: tokens of the tokenizer.
        ranks: GPUs, all of them data parallel.
        gpus_per_node: on one node.
        batch_size: sequences of a step, on all ranks.
        micro_batch_size: sequences of a rank in a micro step.
        zero: DeepSpeed's settings of ZeRO, with its defaults.
        dtype: of the weights that the model computes with.
        states: bytes of an element of each optimizer state.
        all_reduce: whether the optimizer adds up trust-ratio sums.
        sizes: elements of each layer, by parameter group.
        modules: of each module with parameters of its own, in the order of the forward pass, the
            layers by any key, and their elements; a tied layer is in two modules.
        blocks: of each of these modules, the number of the block that it is in, None outside.
        flops: floating-point operations of a token, forward and backward.
        steps: of the whole run; None where nothing tells.
    """

    model: ModelSettings
    vocab_size: int
    ranks: int
    gpus_per_node: int
    batch_size: int
    micro_batch_size: int
    zero: DeepSpeedZeroConfig
    dtype: torch.dtype
    states: Mapping[str, int]
    all_reduce: bool
    sizes: Sequence[Sequence[int]]
    modules: Sequence[Mapping[int, int]]
    blocks: Sequence[int | None]
    flops: int
    steps: int | None

    @property
    def accumulation(self) -> int:
        """Micro steps of a step."""
        return self.batch_size // (self.micro_batch_size * self.ranks)

    @property
    def tokens(self) -> int:
        """Of a step, on all ranks."""
        return self.batch_size * self.model.length

    @property
    def offloads(self) -> bool:
        """Whether optimizer and master weights are in the host's memory."""
        offload = self.zero.offload_optimizer
        return offload is not None and offload.device == "cpu"

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(map(sum, self.sizes))


def read_job(
    config: dict[str, Any],
    model: ModelSettings,
    *,
    nodes: int,
    gpus_per_node: int,
    vocab_size: int,
    steps: int | None,
) -> Job:
    """The job of a DeepSpeed JSON that :mod:`alto_ds.pretrain.deepspeed_json` has checked.

    Raises:
        ValueError: the batch cannot be shared by the ranks, or no plan is made for a setting; names
            the key, its value and what to write instead.
    """
    zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    _refuse_unplanned(config, zero)
    ranks = nodes * gpus_per_node
    batch_size, micro = _batch_sizes(config, ranks)
    made = meta_model(model, vocab_size)
    precisions = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16}
    chosen = [dtype for key, dtype in precisions.items() if config.get(key, {}).get("enabled")]
    optimizer = config["optimizer"]
    params = optimizer.get("params", {})
    ours = optimizer["type"] == "ALTO"
    modules = [
        (own, int(name.split(".")[2]) if ".h." in name else None)
        for name, module in made.named_modules()
        if (own := list(module.parameters(recurse=False)))
    ]
    scheduler = config.get("scheduler", {}).get("params", {})
    return Job(
        model=model,
        vocab_size=vocab_size,
        ranks=ranks,
        gpus_per_node=gpus_per_node,
        batch_size=batch_size,
        micro_batch_size=micro,
        zero=zero,
        dtype=chosen[0] if chosen else torch.float32,
        states=_states(params, batch_size) if ours else {EXP_AVG: 4, EXP_AVG_SQ: 4},
        all_reduce=ours,
        sizes=[[p.numel() for p in group["params"]] for group in parameter_groups(made)],
        modules=[{id(p): p.numel() for p in own} for own, _ in modules],
        blocks=[block for _, block in modules],
        flops=flops_per_token(made, model.length),
        steps=scheduler.get("total_num_steps") if steps is None else steps,
    )


def _states(params: dict[str, Any], batch_size: int) -> dict[str, int]:
    """Bytes of an element of each of ALTO's states, beside fp32 master weights."""
    filled = fill_in_auto("ALTO", params, lambda: batch_size)
    kept = filled.get("state_dtype", "fp32")
    return {
        name: dtype_of(name, torch.float32, kept).itemsize
        for name in names(filled.get("alpha", -5.0))
    }


def _batch_sizes(config: Mapping[str, Any], ranks: int) -> tuple[int, int]:
    """Global batch and micro batch, one of which DeepSpeed computes where it is not given."""
    batch_size = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    if batch_size is None:
        batch_size = (micro or 1) * (accumulation or 1) * ranks
    if micro is None:
        micro = batch_size // (ranks * (accumulation or 1))
    product = micro * ranks
    if not product or batch_size % product:
        raise ValueError(
            f"train_batch_size={batch_size} is not a multiple of train_micro_batch_size_per_gpu="
            f"{micro} times {ranks} GPUs; change one of the three"
        )
    if accumulation is not None and accumulation * product != batch_size:
        raise ValueError(
            f"train_batch_size={batch_size} is not train_micro_batch_size_per_gpu={micro} times "
            f"{ranks} GPUs times gradient_accumulation_steps={accumulation}; leave out the last, "
            "which follows from the others"
        )
    return batch_size, micro


def _refuse_unplanned(config: Mapping[str, Any], zero: DeepSpeedZeroConfig) -> None:
    if zero.stage == 0:
        raise ValueError("zero_optimization.stage=0 is not planned for; write 1, 2 or 3")
    kind = config["optimizer"]["type"]
    if kind not in PLANNED_OPTIMIZERS:
        raise ValueError(
            f'optimizer.type="{kind}" is not planned for; write one of '
            f"{', '.join(PLANNED_OPTIMIZERS)}"
        )
    if config.get("data_types", {}).get("grad_accum_dtype"):
        raise ValueError("data_types.grad_accum_dtype is not planned for; leave it out")
    for name in NOT_PLANNED:
        if config.get("zero_optimization", {}).get(name):
            raise ValueError(f"zero_optimization.{name} is not planned for; leave it out")
    offload = zero.offload_optimizer
    if offload is None or offload.device == "none":
        return
    if offload.device != "cpu" or zero.stage != 3:
        raise ValueError(
            f'zero_optimization.offload_optimizer.device="{offload.device.value}" at stage '
            f'{int(zero.stage)} is not planned for; write "cpu" and stage 3'
        )
