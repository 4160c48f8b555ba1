"""Which tensors take their step together, and in which row of the sums is each layer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from alto_ds.kernels import FragmentTable
from alto_ds.layout import Layer, Layout
from alto_ds.states import STEP, names
from alto_ds.trust_ratio import rows_to_add, sums_dtype


class Part(NamedTuple):
    """A parameter group as a call of ``step()`` finds it."""

    group: dict[str, Any]
    layout: Layout


class Shard(NamedTuple):
    """A tensor that the call updates, with this rank's part of its gradient.

    Attributes:
        tensor: what the group holds.
        grad: this rank's part of the gradient.
        part: the group.
        place: index of the tensor in the group.
    """

    tensor: Tensor
    grad: Tensor
    part: Part
    place: int


class Members(NamedTuple):
    """The shards of a call that form one batch, by their indices, and their fragments."""

    indices: list[int]
    fragments: FragmentTable


class Plan(NamedTuple):
    """All that stays the same while ``step()`` is called for the same tensors.

    Attributes:
        kinds: see :func:`kinds_of`; the plan is good for shards of these kinds.
        batches: the shards that take their step together.
        layers: those of all groups, in the order of their rows in the sums.
        rows: the rows of each group's layers.
        rows_of: the rows to add up over the ranks of each process group.
        sums: ``[layers, 2]``, Σθ² and Σr² of the latest step.
        ratios: ``[layers]``, trust ratios of the latest step.
    """

    kinds: list[Any]
    batches: list[Members]
    layers: list[Layer]
    rows: list[slice]
    rows_of: dict[ProcessGroup, Tensor]
    sums: Tensor
    ratios: Tensor


def kinds_of(
    shards: Sequence[Shard], state: Mapping[Tensor, Mapping[str, Any]]
) -> list[tuple[Any, ...]]:
    """For each shard what tells it from others, and what it has in common with its batch.

    A plan that was made for the same kinds fits: shapes, dtypes and devices of tensor, gradient and
    states are the same, and as many steps lie between the tensors.
    """
    kinds = []
    first_step: Any = None
    for tensor, grad, (group, _), _ in shards:
        own = state[tensor]
        step = own.get(STEP)
        first_step = step if first_step is None else first_step
        whole_numbers = isinstance(step, int) and isinstance(first_step, int)
        ahead = step - first_step if whole_numbers else None
        columns = (tensor, grad, *(own.get(name) for name in names(group["alpha"])))
        dtypes = (x.dtype if isinstance(x, Tensor) else None for x in columns)
        shapes = [(x.shape, x.device) if isinstance(x, Tensor) else None for x in columns]
        kinds.append((id(tensor), (id(group), ahead, tensor.device, *dtypes), shapes))
    return kinds


def make_plan(
    parts: Sequence[Part], shards: Sequence[Shard], state: Mapping[Tensor, Mapping[str, Any]]
) -> Plan:
    """A plan for the shards.

    Rows are counted in the order of the groups' layers, which is the same on all ranks. Batches
    are this rank's own business.
    """
    layers: list[Layer] = []
    rows = []
    first_row = {}
    for group, layout in parts:
        first_row[id(group)] = len(layers)
        rows.append(slice(len(layers), len(layers) + len(layout.layers)))
        layers += layout.layers
    kinds = kinds_of(shards, state)
    indices_of: dict[Any, list[int]] = {}
    for index, (_, batch, _) in enumerate(kinds):
        indices_of.setdefault(batch, []).append(index)
    batches = []
    for indices in indices_of.values():
        group, layout = shards[indices[0]].part
        tensor_of = {shards[index].place: i for i, index in enumerate(indices)}
        fragments = [
            f._replace(tensor=tensor_of[f.tensor], layer=first_row[id(group)] + f.layer)
            for f in layout.fragments
            if f.tensor in tensor_of
        ]
        batches.append(Members(indices, FragmentTable(fragments)))
    device = shards[0].grad.device if shards else layers[0].param.device
    sums = torch.zeros(len(layers), 2, dtype=sums_dtype(device), device=device)
    ratios = torch.ones_like(sums[:, 0])
    return Plan(kinds, batches, layers, rows, rows_to_add(layers), sums, ratios)


def name_of(layout: Layout, place: int) -> str:
    """The layers of which the group's tensor number ``place`` has parts, for messages."""
    found = [layout.layers[f.layer].name for f in layout.fragments if f.tensor == place]
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else "an empty part"
