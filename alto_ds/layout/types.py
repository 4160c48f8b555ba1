"""Layers, fragments and layouts: plain data that describes how a tensor is sharded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one layer inside a tensor.

    Attributes:
        layer: index into :attr:`Layout.layers`.
        start: first element of the range, counted in the flattened layer.
        length: number of elements.
        offset: where the range begins, counted in the flattened tensor.
        whole: the range is the whole layer; no other rank has a part of it.
    """

    layer: int
    start: int
    length: int
    offset: int
    whole: bool = False


@dataclass(frozen=True)
class Layout:
    """What one tensor of an optimizer holds.

    Elements of the tensor that lie in no fragment are padding: they are never read or written.

    Attributes:
        layers: every layer that has a part of this tensor *on any rank*, in an order that is the
            same on all ranks. A rank may hold no fragment of some of them, or of all.
        fragments: the ranges that are in this rank's tensor.
        master_copy: the tensor is a wrapper's copy of one whole parameter.
        fp32_states: the wrapper can keep states only in float32.
    """

    layers: tuple[Layer, ...]
    fragments: tuple[Fragment, ...]
    master_copy: bool = False
    fp32_states: bool = False
