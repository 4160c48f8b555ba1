"""What of megatron-core's settings ALTO and E cannot compute exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from alto_ds.megatron import layer_wise


def refuse(config: Any, model_chunks: Sequence[Any]) -> None:
    """Refuse what is not exact, on all ranks together; all of them call this.

    Args:
        config: megatron-core's ``OptimizerConfig``.
        model_chunks: this rank's part of the model, wrapped for data parallelism.

    Raises:
        ValueError: names the setting, its value and what to write instead.
    """
    # Only some stages of a pipeline may have what is refused.
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, next(_reasons(config, model_chunks), None))
    reason = next(filter(None, of_ranks), None)
    if reason:
        raise ValueError(f"alto_ds.megatron: {reason}")


def _reasons(config: Any, model_chunks: Sequence[Any]) -> Iterator[str]:
    if config.optimizer != "adam":
        yield (
            f'config.optimizer={config.optimizer!r} has no place for ALTO or E; write "adam", in '
            "whose place they are put."
        )
    if config.fp16:
        yield "config.fp16=True is not supported; write bf16=True."
    if not config.decoupled_weight_decay:
        yield (
            "config.decoupled_weight_decay=False is not supported, for weight decay is part of "
            "the update whose norm ALTO takes; write True."
        )
    for name, remedy in (
        ("use_precision_aware_optimizer", 'write False; state_dtype="bf16" saves memory'),
        ("optimizer_cpu_offload", "write False"),
        ("optimizer_cuda_graph", "write False"),
    ):
        if getattr(config, name, False):
            yield f"config.{name}=True needs megatron-core's own Adam; {remedy}."
    for chunk in model_chunks:
        yield from _reasons_in(chunk)
        if layer_wise.is_asked_for(config):
            yield from layer_wise.reasons_against(config, chunk.ddp_config)


def _reasons_in(chunk: Any) -> Iterator[str]:
    ddp_config = getattr(chunk, "ddp_config", None)
    if type(chunk).__name__ != "DistributedDataParallel":
        yield (
            f"a model in {type(chunk).__name__} is not supported; wrap it in megatron-core's "
            "DistributedDataParallel, with use_distributed_optimizer=True to shard the states."
        )
    if getattr(ddp_config, "use_megatron_fsdp", False):
        yield (
            "use_megatron_fsdp=True is not supported; write use_distributed_optimizer=True to "
            "shard the states."
        )
    instances = getattr(ddp_config, "num_distributed_optimizer_instances", 1)
    if instances > 1:
        yield f"num_distributed_optimizer_instances={instances} is not supported; write 1."
    for setting in ("fp8_param", "fp4_param"):
        if getattr(chunk.config, setting, False):
            yield (
                f"{setting}=True keeps weights in a format that ALTO does not know; keep them in "
                f"bf16 with {setting}=False, and compute in it all the same."
            )
    for setting in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"):
        size = getattr(chunk.config, setting, 1)
        if size > 1:
            yield (
                f"{setting}={size} cuts layers in a way that ALTO does not know; write 1, and cut "
                "them by tensor_model_parallel_size."
            )
    sizes = (chunk.config.tensor_model_parallel_size, chunk.config.expert_tensor_parallel_size)
    if not chunk.config.perform_initialization and sizes != (1, 1):
        yield (
            "perform_initialization=False leaves layers without the mark that says whether tensor "
            "parallelism cuts them; write True."
        )
    for name, module in chunk.named_modules():
        if (
            getattr(module, "is_expert", False)
            and chunk.config.expert_model_parallel_size == 1
            and len(set(sizes)) > 1
        ):
            yield (
                f"expert_tensor_parallel_size={sizes[1]} beside tensor_model_parallel_size="
                f"{sizes[0]} is supported with expert_model_parallel_size above 1 only, where "
                f"megatron-core tells experts such as {name} apart; write equal sizes."
            )
        if type(module).__name__ == "GroupedMLP" and module.expert_parallel:
            yield (
                f"{name} is a GroupedMLP, which keeps all experts of a rank in one parameter, so "
                "that trust ratios would depend on the number of ranks; use TEGroupedMLP or "
                "SequentialMLP."
            )
