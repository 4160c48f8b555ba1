"""Which part of which layer lies where: found from DeepSpeed's own lists, not from alto_ds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from tests.sharding.linear_model import LinearModel


class Piece(NamedTuple):
    """Elements ``start`` to ``start + length`` of a layer, at ``offset`` in a tensor."""

    name: str
    start: int
    length: int
    offset: int


Pieces = Mapping[Tensor, list[Piece]]  # for each tensor of this rank's optimizer

# Names of a wrapper's lists of flat tensors, and of the parameters in each.
FLAT_LISTS = {
    "DeepSpeedZeroOptimizer": ("single_partition_of_fp32_groups", "round_robin_bit16_groups"),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "bf16_groups"),
}


def pieces_of(engine: Any, optimizer: Optimizer) -> Pieces:
    """The pieces of a LinearModel in this rank's ``optimizer``, which the engine has wrapped."""
    wrapper, model = engine.optimizer, engine.module
    names = {param: name for name, param in model.named_parameters()}
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        groups = zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
        return {flat: _parts(params, names) for flat, params in groups}
    if type(wrapper).__name__ in FLAT_LISTS:
        flats, members = (getattr(wrapper, name) for name in FLAT_LISTS[type(wrapper).__name__])
        groups = zip(flats, members, strict=True)
        return {flat: _slice(flat.numel(), params, names) for flat, params in groups}
    masters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    owners = [
        param
        for group in model.groups()
        for param in group["params"]
        if wrapper is optimizer or param.requires_grad
    ]
    return {
        tensor: [Piece(names[param], 0, param.numel(), 0)]
        for tensor, param in zip(masters, owners, strict=True)
    }


def _parts(params: Iterable[Any], names: Mapping[Tensor, str]) -> list[Piece]:
    """ZeRO-3: an equal part of each parameter, with padding at the end of the last ones."""
    pieces, offset = [], 0
    for param in params:
        part = -(-param.ds_numel // dist.get_world_size())
        start = min(dist.get_rank() * part, param.ds_numel)
        length = min(part, param.ds_numel - start)
        pieces.append(Piece(names[param], start, length, offset))
        offset += part
    return pieces


def _slice(size: int, params: Iterable[Tensor], names: Mapping[Tensor, str]) -> list[Piece]:
    """ZeRO-1 and 2: a slice of all parameters in a row."""
    pieces, position = [], 0
    begin = dist.get_rank() * size
    for param in params:
        low, high = max(position, begin), min(position + param.numel(), begin + size)
        if low < high:
            pieces.append(Piece(names[param], low - position, high - low, low - begin))
        position += param.numel()
    return pieces


def padding_of(tensor: Tensor, pieces: Iterable[Piece]) -> Tensor:
    """Mask of the elements that belong to no parameter."""
    mask = torch.ones(tensor.numel(), dtype=torch.bool)
    for piece in pieces:
        mask[piece.offset : piece.offset + piece.length] = False
    return mask


def assemble(
    values: Mapping[str, Mapping[Tensor, Tensor]], pieces: Pieces, sharded: bool, group: Any = None
) -> dict[str, dict[str, Tensor]]:
    """Whole layers from the parts that all ranks hold; each element must be there just once.

    All ranks call this together, unless layers are not sharded.

    Args:
        values: for each key, such as a state's name, ``[..., elements]`` of some of the
            optimizer's tensors.
        pieces: where layers lie in these.
        sharded: whether other ranks hold the rest.
        group: the ranks that call this; None for all.

    Returns:
        For each key the layers ``[..., *shape]`` by their names.
    """
    mine = [
        (key, p.name, p.start, value.detach()[..., p.offset : p.offset + p.length].cpu().clone())
        for key, tensors in values.items()
        for tensor, value in tensors.items()
        for p in pieces[tensor]
    ]
    if sharded:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=group)
        mine = [part for parts in everyone for part in parts]
    parts_of: dict[str, dict[str, list[Tensor]]] = {key: {} for key in values}
    for key, name, start, part in sorted(mine, key=lambda part: part[:3]):
        parts = parts_of[key].setdefault(name, [])
        done = sum(part.shape[-1] for part in parts)
        assert done == start, f"{key} of {name}: {done} elements before element {start}"
        parts.append(part)
    return {
        key: {name: _join(parts, LinearModel.SHAPES[name]) for name, parts in layers.items()}
        for key, layers in parts_of.items()
    }


def _join(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    joined = torch.cat(parts, -1)
    assert joined.shape[-1] == torch.Size(shape).numel(), "parts of a layer are missing"
    return joined.view(*joined.shape[:-1], *shape)
