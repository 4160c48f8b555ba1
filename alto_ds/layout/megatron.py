"""megatron-core's optimizers: a tensor for each parameter of which this rank updates a range.

``DistributedOptimizer`` lays the parameters of a rank's model out in buffers, gives each rank of
the data-parallel group a slice, and its inner optimizer one tensor for each parameter that the
slice touches: none for the others, and on some ranks none at all. Nothing on such a tensor says
which range it is, so :mod:`alto_ds.megatron`, which makes the optimizer, tells it. megatron-core's
other optimizers update whole parameters or copies of them, which are ranges as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alto_ds.layout.types import Fragment, Layer, Layout


class Range(NamedTuple):
    """What a tensor of an optimizer is: the elements of ``param`` from ``start`` on."""

    param: Tensor
    start: int


class Owners(NamedTuple):
    """Who holds the rest of a layer.

    Attributes:
        of_ranges: the process group whose ranks update the other ranges of what is one parameter
            on this rank; None where this rank updates all of it.
        of_parts: the tensor-parallel group whose ranks have the other parts of the layer; None
            where the parameter is the whole layer.
    """

    of_ranges: ProcessGroup | None
    of_parts: ProcessGroup | None


def layout_of(
    tensors: Sequence[Tensor],
    ranges: Mapping[Tensor, Range],
    names: Mapping[Tensor, str],
    owners: Mapping[Tensor, Owners],
) -> Layout:
    """Return the layout of a parameter group.

    Args:
        tensors: what the group holds on this rank, maybe nothing.
        ranges: what each of them is.
        names: for each parameter of the group that *any* rank updates a range of, its name; in an
            order that is the same on all ranks.
        owners: for each of these parameters.
    """
    rows = {param: row for row, param in enumerate(names)}
    layers = tuple(
        Layer(param, name, tuple(g for g in owners[param] if g is not None and _is_shared(g)))
        for param, name in names.items()
    )
    fragments = tuple(
        Fragment(
            tensor=place,
            offset=0,
            length=tensor.numel(),
            start=ranges[tensor].start,
            layer=rows[ranges[tensor].param],
            whole=tensor.numel() == ranges[tensor].param.numel()
            and not _is_shared(owners[ranges[tensor].param].of_parts),
        )
        for place, tensor in enumerate(tensors)
    )
    return Layout(layers, fragments)


def _is_shared(group: ProcessGroup | None) -> bool:
    """Whether there are others in the group, so that something must be sent."""
    return group is not None and dist.get_world_size(group) > 1
