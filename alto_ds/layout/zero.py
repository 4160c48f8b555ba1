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

from alto_ds.layout import tensor_parallel
from alto_ds.layout.types import Fragment, Layer, Layout, Names

# What DeepSpeed leaves on parameters, on ZeRO-3's optimizer and on its NVMe swapper.
ATTRIBUTES = (
    *("_hp_mapping", "_dp_group"),  # ZeRO-1, ZeRO-2, BF16_Optimizer
    *("_z3_optimizer", "ds_numel", "ds_tensor", "ds_process_group"),
    *("fp32_partitioned_groups_flat", "fp16_groups", "optimizer_swapper"),
)


def resolve(
    tensors: Sequence[torch.Tensor], params: Sequence[torch.Tensor], names: Names
) -> list[Layout] | None:
    """See :func:`alto_ds.layout.resolve`; None where the parameters are not under ZeRO."""
    try:
        for param in params:
            if hasattr(param, "_z3_optimizer"):
                return [_parts(tensor, param._z3_optimizer, names) for tensor in tensors]
        flattened = [param for param in params if hasattr(param, "_hp_mapping")]
        if flattened and len(tensors) == 1:
            return [_slice(tensors[0], flattened, names)]
    except AttributeError as error:
        raise RuntimeError(
            f"alto_ds looked for {', '.join(ATTRIBUTES)} to find out how DeepSpeed's ZeRO has cut "
            f"the layers, and this version of it differs ({error}). Install a version that the "
            "README lists as exact."
        ) from error
    return None


def _check_swapping(zero3: Any, params: Sequence[Any], names: Names) -> None:
    """Refuse what ZeRO-Infinity's swapping to NVMe does wrong, for any optimizer.

    Raises:
        RuntimeError: there are too few buffers, which DeepSpeed would report in the second step
            by an assertion that names no setting; or a large gradient would get lost, because
            direct I/O of a misaligned piece of memory fails without an error.
    """
    swapper = getattr(zero3, "optimizer_swapper", None)
    if swapper is None:
        return
    buffers = swapper.swap_config.buffer_count
    if buffers < 5:
        raise RuntimeError(
            f'alto_ds: "offload_optimizer": {{"buffer_count": {buffers}}} is too few; write 5, for '
            "the parameter, its gradient and three states."
        )
    offset = 0
    for param in params:
        part = param.ds_tensor.ds_numel
        if offset % swapper.numel_alignment and swapper.is_swappable_tensor(numel=part):
            raise RuntimeError(
                f"alto_ds: DeepSpeed loses the gradient of {names[param]} on its way to NVMe, for "
                f"it starts at element {offset} of its sub-group, no multiple of "
                f'{swapper.numel_alignment}; write "sub_group_size": 1 under "zero_optimization", '
                "which gives each parameter a sub-group of its own."
            )
        offset += part


def _layer(param: torch.Tensor, group: ProcessGroup, names: Names) -> Layer:
    """The layer of ``param``, which the ranks of ``group`` share.

    A group of one rank is left out, so that nothing is sent for it.
    """
    shared = (group,) if dist.get_world_size(group) > 1 else ()
    return Layer(param, names[param], (*shared, *tensor_parallel.groups_of(param, names[param])))


def _is_whole(layer: Layer, group: ProcessGroup) -> bool:
    """Whether the model's parameter is the whole layer: no group but ZeRO's own shares it."""
    return set(layer.groups) <= {group}


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
            whole = high - low == param.numel() and _is_whole(layers[index], group)
            fragments.append(Fragment(index, low - layer_begin, high - low, low - begin, whole))
    return Layout(layers, tuple(fragments))


def _parts(flat: torch.Tensor, zero3: Any, names: Names) -> Layout:
    """ZeRO-3: this rank's part of every parameter of one sub-group.

    The last ranks' parts end in padding, which is uninitialised memory.
    """
    sub_groups = zip(zero3.fp32_partitioned_groups_flat, zero3.fp16_groups, strict=True)
    params = next((params for tensor, params in sub_groups if tensor is flat), None)
    if params is None:
        raise RuntimeError(
            f"alto_ds found no sub-group of ZeRO-3 that owns the tensor of {flat.numel()} elements "
            "in the parameter group."
        )
    _check_swapping(zero3, params, names)
    layers = tuple(_layer(param, param.ds_process_group, names) for param in params)
    fragments = []
    offset = 0
    for index, param in enumerate(params):
        part = param.ds_tensor.ds_numel
        start = dist.get_rank(param.ds_process_group) * part
        length = min(max(param.ds_numel - start, 0), part)
        if length > 0:
            whole = length == param.ds_numel and _is_whole(layers[index], param.ds_process_group)
            fragments.append(Fragment(index, start, length, offset, whole))
        offset += part
    # Its buffers are float32, whatever is written to NVMe.
    swapped = getattr(zero3, "optimizer_swapper", None) is not None
    return Layout(layers, tuple(fragments), fp32_states=swapped)
