"""Layers, fragments and layouts: plain data that describes how a parameter group is sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

Names = Mapping[torch.Tensor, str]


@dataclass(frozen=True, eq=False)
class Layer:
    """One parameter of the model.

    Attributes:
        param: the model's parameter. Under ZeRO-3 its data may be empty.
        name: its name in the model where that is known, else its place in the parameter groups.
        groups: process groups over which the layer's sums of squares must be added, one after the
            other. Empty where every rank holds the whole layer.
    """

    param: torch.Tensor
    name: str
    groups: tuple[ProcessGroup, ...] = ()


class Fragment(NamedTuple):
    """A contiguous range of one layer inside a tensor.

    Attributes:
        tensor: index into the tensors of the parameter group.
        offset: where the range begins, counted in the flattened tensor.
        length: number of elements.
        start: first element of the range, counted in the flattened layer.
        layer: index into :attr:`Layout.layers`.
        whole: the range is the whole layer; no other rank has a part of it.
    """

    tensor: int
    offset: int
    length: int
    start: int
    layer: int
    whole: bool


@dataclass(frozen=True, eq=False)
class Layout:
    """What the tensors of one parameter group hold when ``step()`` is called.

    Elements that lie in no fragment are padding: they are never read or written.

    Attributes:
        layers: every layer that is in this group's tensors *on any rank*, in an order that is the
            same on all ranks. All of them take part in the collective, also on a rank that holds
            no fragment of some of them, or no tensor at all.
        fragments: the ranges that are in this rank's tensors, at most one of each layer.
        master_copy: tensor i is a wrapper's copy of the parameter that is layer i.
    """

    layers: tuple[Layer, ...] = ()
    fragments: tuple[Fragment, ...] = ()
    master_copy: bool = False


class Framework(NamedTuple):
    """What one way of sharding knows; either answer may be missing.

    Attributes:
        resolve: ``(tensors, params, names) -> Layout | None``, which ranges of which layers are in
            a group's tensors; see :func:`alto_ds.layout.resolve`. None is returned where the
            tensors are not of this framework. A fragment is marked as whole where it is all of
            the model's parameter on this rank.
        groups_of: ``(param, name) -> process groups``, whose ranks hold the other parts of what is
            one parameter of this rank's model; empty where it is whole.
    """

    resolve: (
        Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], Names], Layout | None] | None
    ) = None
    groups_of: Callable[[torch.Tensor, str], tuple[ProcessGroup, ...]] | None = None
