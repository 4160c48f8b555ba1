"""Tensor parallelism: which process group holds the other parts of a parameter?

Megatron-LM, megatron-core and DeepSpeed's AutoTP mark a parameter of which each rank of a group
has a part with ``tensor_model_parallel``, DeepSpeed's own convention is ``model_parallel``.
Parameters without a mark are replicated: their sums are the whole layer's already. Neither
library is imported here; one that marked parameters has been.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_MARKS = ("tensor_model_parallel", "model_parallel")


def groups_of(param: torch.Tensor, name: str) -> tuple[ProcessGroup, ...]:
    """The tensor-parallel group of a marked parameter; none where it is whole on this rank.

    Raises:
        RuntimeError: the parameter is marked, and several ranks run, but nothing tells the group.
    """
    if not any(getattr(param, mark, False) for mark in _MARKS):
        return ()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ()
    for group in _known_groups():
        return (group,) if dist.get_world_size(group) > 1 else ()
    raise RuntimeError(
        f"alto_ds: parameter {name} is marked as tensor parallel, but its process group is not "
        "known; pass mpu= to deepspeed.initialize(), or initialise megatron.core.parallel_state "
        "before the first step."
    )


def _known_groups() -> Iterator[ProcessGroup]:
    """Tensor-parallel groups, from the most to the least particular source."""
    deepspeed_groups: Any = sys.modules.get("deepspeed.utils.groups")
    mpu = getattr(deepspeed_groups, "mpu", None)
    if mpu is not None:
        for getter in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
            if hasattr(mpu, getter):
                yield getattr(mpu, getter)()
    group = getattr(deepspeed_groups, "_TENSOR_MODEL_PARALLEL_GROUP", None)  # AutoTP
    if group is not None:
        yield group
    megatron: Any = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.model_parallel_is_initialized():
        yield megatron.get_tensor_model_parallel_group()
