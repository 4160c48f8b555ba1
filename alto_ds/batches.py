"""Which tensors take their step together, and in which row of the sums is each layer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from alto_ds.kernels import FragmentTable, largest_weight
from alto_ds.layout import Layer, Layout
from alto_ds.states import STEP
from alto_ds.trust_ratio import rows_to_add, sums_dtype


class Part(NamedTuple):
    """A parameter group as a call of ``step()`` finds it."""

    group: dict[str, Any]
    layout: Layout


class Shard(NamedTuple):
    """A tensor that the call updates.

    Attributes:
        tensor: what the group holds.
        state: its states.
        columns: this rank's parts of the parameter, of its gradient and of the states, in the
            order of :func:`alto_ds.states.names`.
        part: the group.
        place: index of the tensor in the group.
    """

    tensor: Tensor
    state: dict[str, Any]
    columns: tuple[Tensor, ...]
    part: Part
    place: int

    def is_fresh(self) -> bool:
        """Whether the tensor has taken no step."""
        return isinstance(self.state.get(STEP), int) and self.state[STEP] == 0


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
        rows_of: the rows to add up over the ranks of each process group, the last row always.
        sums: ``[layers + 1, 2]``, Σθ² and Σr² of the latest step; :mod:`alto_ds.nonfinite` has the
            last row.
        ratios: ``[layers]``, trust ratios of the latest step.
        largest: ``[layers]``, what a weight may become; see :mod:`alto_ds.nonfinite`.
    """

    kinds: list[Any] | None
    batches: list[Members]
    layers: list[Layer]
    rows: list[slice]
    rows_of: dict[ProcessGroup, Tensor]
    sums: Tensor
    ratios: Tensor
    largest: Tensor


def kinds_of(shards: Sequence[Shard]) -> list[Any] | None:
    """All by which a plan must fit the shards: two lists that are equal have the same plan.

    Tensors, steps that lie between them, and shapes, dtypes and devices of all columns. None where
    a state is missing or of another kind, which no plan fits.
    """
    try:
        steps = [shard.state[STEP] for shard in shards]
        counted = all(type(step) is int for step in steps)
        columns = [column for shard in shards for column in shard.columns]
        return [
            [id(shard.tensor) for shard in shards],
            [step - steps[0] for step in steps] if counted else None,
            [column.shape for column in columns],
            [column.dtype for column in columns],
            [column.device for column in columns],
        ]
    except (AttributeError, KeyError, TypeError):
        return None


def make_plan(parts: Sequence[Part], shards: Sequence[Shard]) -> Plan:
    """A plan for the shards, whose states have been checked.

    Rows are counted in the order of the groups' layers, which is the same on all ranks. Batches
    are this rank's own business.

    Raises:
        RuntimeError: a layout reaches beyond its tensor.
    """
    layers: list[Layer] = []
    rows = []
    first_row = {}
    for group, layout in parts:
        first_row[id(group)] = len(layers)
        rows.append(slice(len(layers), len(layers) + len(layout.layers)))
        layers += layout.layers
    indices_of: dict[Any, list[int]] = {}
    for index, shard in enumerate(shards):
        dtypes = (column.dtype for column in shard.columns)
        kind = (id(shard.part.group), shard.state[STEP], shard.columns[0].device, *dtypes)
        indices_of.setdefault(kind, []).append(index)
    batches = []
    for indices in indices_of.values():
        group, layout = shards[indices[0]].part
        tensor_of = {shards[index].place: i for i, index in enumerate(indices)}
        sizes = [shards[index].columns[0].numel() for index in indices]
        fragments = [
            f._replace(tensor=tensor_of[f.tensor], layer=first_row[id(group)] + f.layer)
            for f in layout.fragments
            if f.tensor in tensor_of
        ]
        for f in fragments:
            if f.offset + f.length > sizes[f.tensor]:
                raise RuntimeError(
                    f"alto_ds: the layout of {layers[f.layer].name} reaches to element "
                    f"{f.offset + f.length} of a tensor of {sizes[f.tensor]}; its framework in "
                    "alto_ds/layout is wrong."
                )
        batches.append(Members(indices, FragmentTable(fragments)))
    device = shards[0].columns[0].device if shards else layers[0].param.device
    sums = torch.zeros(len(layers) + 1, 2, dtype=sums_dtype(device), device=device)
    ratios = torch.ones_like(sums[:-1, 0])
    largest = ratios.new_tensor([largest_weight(layer.param.dtype) for layer in layers])
    last = torch.tensor([len(layers)])
    rows_of = {group: torch.cat([shared, last]) for group, shared in rows_to_add(layers).items()}
    return Plan(kinds_of(shards), batches, layers, rows, rows_of, sums, ratios, largest)


def name_of(layout: Layout, place: int) -> str:
    """The layers of which the group's tensor number ``place`` has parts, for messages."""
    found = [layout.layers[f.layer].name for f in layout.fragments if f.tensor == place]
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else "an empty part"
