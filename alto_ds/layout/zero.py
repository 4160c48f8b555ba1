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

from alto_ds.layout.cut import Piece, pieces_of_parts, pieces_of_slice
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
    places = [(param.storage_offset() - buffer_begin, param.numel()) for param in params]
    pieces = pieces_of_slice(places, flat.numel(), dist.get_rank(group))
    fragments = [_fragment(0, piece, params[piece.layer].numel()) for piece in pieces]
    return Layout(layers, tuple(fragments))


def _parts(tensors: Sequence[torch.Tensor], zero3: Any, names: Names) -> Layout:
    """ZeRO-3: this rank's part of every parameter of the sub-groups whose tensors are given.

    The last ranks' parts end in padding, which is uninitialised memory.
    """
    layers: list[Layer] = []
    fragments: list[Fragment] = []
    for index, flat in enumerate(tensors):
        params = sub_group_of(flat, zero3)
        parts = [
            (p.ds_numel, p.ds_tensor.ds_numel, dist.get_rank(p.ds_process_group)) for p in params
        ]
        fragments += [
            _fragment(index, piece, parts[piece.layer][0], len(layers))
            for piece in pieces_of_parts(parts)
        ]
        layers += [_layer(param, param.ds_process_group, names) for param in params]
    return Layout(tuple(layers), tuple(fragments))


def _fragment(tensor: int, piece: Piece, layer_size: int, first_layer: int = 0) -> Fragment:
    whole = piece.length == layer_size
    return Fragment(
        tensor, piece.offset, piece.length, piece.start, first_layer + piece.layer, whole
    )
