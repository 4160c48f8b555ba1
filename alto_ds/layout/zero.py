"""DeepSpeed's ZeRO: flat tensors that are cut without regard for where a layer ends.

ZeRO-1, ZeRO-2 and ``BF16_Optimizer`` concatenate the parameters of a group into one flat buffer,
pad its end and give each rank of the data-parallel group an equal slice. ZeRO-3 cuts each
parameter into equal parts, one a rank, and concatenates this rank's parts, each with padding at
its own end. DeepSpeed is never imported here: what it leaves on the parameters tells enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from alto_ds.layout.types import Fragment, Layer, Layout, Names

# What DeepSpeed leaves on parameters and on ZeRO-3's optimizer.
ATTRIBUTES = (
    *("_hp_mapping", "_dp_group"),  # ZeRO-1, ZeRO-2, BF16_Optimizer
    *("_z3_optimizer", "ds_numel", "ds_tensor", "ds_process_group"),
    *("fp32_partitioned_groups_flat", "fp16_groups"),
)


def resolve(
    tensors: Sequence[torch.Tensor], params: Sequence[torch.Tensor], names: Names
) -> Layout | None:
    """See :func:`alto_ds.layout.resolve`; None where the parameters are not under ZeRO."""
    try:
        for param in params:
            if hasattr(param, "_z3_optimizer"):
                return _parts(tensors, param._z3_optimizer, names)
        flattened = [param for param in params if hasattr(param, "_hp_mapping")]
        if flattened and len(tensors) == 1:
            return _slice(tensors[0], flattened, names)
    except AttributeError as error:
        raise RuntimeError(
            f"alto_ds looked for {', '.join(ATTRIBUTES)} to find out how DeepSpeed's ZeRO has cut "
            f"the layers, and this version of it differs ({error}). Install a version that the "
            "README lists as exact."
        ) from error
    return None


def sub_group_of(flat: torch.Tensor, zero3: Any) -> Sequence[Any]:
    """The parameters of which a flat tensor of ZeRO-3 holds this rank's parts, in their order.

    Raises:
        RuntimeError: it is none of ZeRO-3's tensors.
    """
    sub_groups = zip(zero3.fp32_partitioned_groups_flat, zero3.fp16_groups, strict=True)
    params = next((params for tensor, params in sub_groups if tensor is flat), None)
    if params is None:
        raise RuntimeError(
            f"alto_ds found no sub-group of ZeRO-3 that owns the tensor of {flat.numel()} elements "
            "in the parameter group."
        )
    return params


def _layer(param: torch.Tensor, group: ProcessGroup, names: Names) -> Layer:
    """The layer of ``param``, which the ranks of ``group`` share.

    A group of one rank is left out, so that nothing is sent for it.
    """
    return Layer(param, names[param], (group,) if dist.get_world_size(group) > 1 else ())


def _slice(flat: torch.Tensor, params: Sequence[Any], names: Names) -> Layout:
    """ZeRO-1, ZeRO-2, BF16_Optimizer: this rank's slice of the group's flat buffer.

    The model's parameters are views into that buffer, so their storage offsets tell where each
    one lies, also with ``round_robin_gradients``, which reorders the buffer.
    """
    group = params[0]._dp_group
    begin = dist.get_rank(group) * flat.numel()
    end = begin + flat.numel()
    buffer_begin = min(param.storage_offset() for param in params)
    buffer_end = max(param.storage_offset() + param.numel() for param in params)
    fits = buffer_end - buffer_begin <= flat.numel() * dist.get_world_size(group)
    if not fits or len({param.untyped_storage().data_ptr() for param in params}) != 1:
        raise RuntimeError(
            f"alto_ds expects the {len(params)} parameters of a ZeRO group to be views of one "
            f"flat buffer, of which each rank has {flat.numel()} elements, and they are not: were "
            "they moved or reloaded after deepspeed.initialize()? Take a step before doing that."
        )
    layers = tuple(_layer(param, group, names) for param in params)
    fragments = []
    for index, param in enumerate(params):
        layer_begin = param.storage_offset() - buffer_begin
        low = max(layer_begin, begin)
        high = min(layer_begin + param.numel(), end)
        if low < high:
            whole = high - low == param.numel()
            fragments.append(Fragment(0, low - begin, high - low, low - layer_begin, index, whole))
    return Layout(layers, tuple(fragments))


def _parts(tensors: Sequence[torch.Tensor], zero3: Any, names: Names) -> Layout:
    """ZeRO-3: this rank's part of every parameter of the sub-groups whose tensors are given.

    The last ranks' parts end in padding, which is uninitialised memory.
    """
    layers: list[Layer] = []
    fragments = []
    for index, flat in enumerate(tensors):
        offset = 0
        for param in sub_group_of(flat, zero3):
            part = param.ds_tensor.ds_numel
            start = dist.get_rank(param.ds_process_group) * part
            length = min(max(param.ds_numel - start, 0), part)
            if length > 0:
                whole = length == param.ds_numel
                fragments.append(Fragment(index, offset, length, start, len(layers), whole))
            layers.append(_layer(param, param.ds_process_group, names))
            offset += part
    return Layout(tuple(layers), tuple(fragments))
