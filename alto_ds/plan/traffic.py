"""How many bytes does each collective of a step take?

Bytes are those of the largest tensor that a rank gives to the collective or gets from it, added up
over a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from alto_ds.layout.cut import part_size, slice_size
from alto_ds.plan.job import Job

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"


class Traffic(NamedTuple):
    """One kind of collective in one step.

    Attributes:
        what: is sent, for people.
        collective: its kind.
        bytes: of its tensors, in a step.
    """

    what: str
    collective: str
    bytes: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, by a ring."""
        return self.bytes * (ranks - 1) / ranks * (2 if self.collective == ALL_REDUCE else 1)


def traffic(job: Job) -> list[Traffic]:
    """The collectives of a step; none on one rank.

    ZeRO-1 reduces gradients once a step, ZeRO-2 and 3 in every micro step. DeepSpeed's ZeRO-2 does
    so by all-reduce too, though a rank keeps its slice only (``use_multi_rank_bucket_allreduce``).
    """
    if job.ranks == 1:
        return []
    b = job.dtype.itemsize
    alto = [Traffic("trust ratios (ALTO)", ALL_REDUCE, alto_bytes(job))] if job.all_reduce else []
    if job.zero.stage < 3:
        reductions = job.accumulation if job.zero.stage == 2 else 1
        padded = sum(slice_size(sizes, job.ranks) * job.ranks for sizes in job.sizes)
        return [
            Traffic("gradients", ALL_REDUCE, job.numel * b * reductions),
            Traffic("weights", ALL_GATHER, padded * b),
            *alto,
        ]
    layers = _layers(job)
    padded_parts = sum(_padded(size, job.ranks) for size in layers.values())
    gathered = sum(_padded(size, job.ranks) for size in gathering(job).sizes)
    always = sum(_padded(layers[key], job.ranks) for key in persistent(job))
    return [
        Traffic("weights, in each micro step", ALL_GATHER, gathered * b * job.accumulation),
        Traffic("small weights, once a step", ALL_GATHER, always * b),
        Traffic("gradients", REDUCE_SCATTER, padded_parts * b * job.accumulation),
        *alto,
    ]


def alto_bytes(job: Job) -> int:
    """Of ALTO's all-reduces, one for each call of ``step()``.

    Σθ² and Σr² of each layer in float64, and 16 bytes a call, by which NaN is told.
    """
    calls = len(job.sizes) if job.zero.stage < 3 else len(sub_groups(job))
    return 16 * sum(map(len, job.sizes)) + 16 * calls


def sub_groups(job: Job) -> list[int]:
    """Elements of a rank's flat tensors under ZeRO-3, which has one ``step()`` for each.

    DeepSpeed begins another one as soon as one has ``sub_group_size`` elements.
    """
    found = []
    for sizes in job.sizes:
        elements = 0
        for size in sizes:
            elements += part_size(size, job.ranks)
            if elements >= job.zero.sub_group_size:
                found.append(elements)
                elements = 0
        if elements:
            found.append(elements)
    return found


def persistent(job: Job) -> list[int]:
    """Keys of the layers that ZeRO-3 keeps whole on every rank, small ones."""
    kept: dict[int, int] = {}
    for key, size in _layers(job).items():
        fits = size + sum(kept.values()) <= job.zero.model_persistence_threshold
        if fits and size <= job.zero.param_persistence_threshold:
            kept[key] = size
    return list(kept)


class Gathering(NamedTuple):
    """What ZeRO-3 gathers in a micro step, without layers that are always whole.

    Attributes:
        sizes: elements of each layer, as often as it is gathered.
        peak: elements of layers that are whole at once, at most.
    """

    sizes: list[int]
    peak: int


def gathering(job: Job) -> Gathering:
    """Follow the layers through the forward and the backward pass.

    DeepSpeed frees a layer after a module, except where one of the next modules, which together
    have ``stage3_max_reuse_distance`` elements, uses it again.
    """
    always = set(persistent(job))
    order = _order(job)
    held: dict[int, int] = {}
    sizes, peak = [], 0
    for position, module in enumerate(order):
        for key, size in module.items():
            if key not in always and key not in held:
                held[key] = size
                sizes.append(size)
        peak = max(peak, sum(held.values()))
        soon = _used_soon(order[position + 1 :], job.zero.max_reuse_distance)
        for key in module.keys() - soon:
            held.pop(key, None)
    return Gathering(sizes, peak)


def _used_soon(modules: Sequence[Mapping[int, int]], distance: int) -> set[int]:
    """Keys of the layers of the first modules, until they have ``distance`` elements."""
    found: set[int] = set()
    traversed = 0
    for module in modules:
        if traversed >= distance:
            break
        found |= module.keys()
        traversed += sum(module.values())
    return found


def _order(job: Job) -> list[Mapping[int, int]]:
    """Modules in the order in which a micro step uses them."""
    numbered = list(zip(job.modules, job.blocks, strict=True))
    backward: list[Mapping[int, int]] = []
    # Modules of one block, or one that is in none.
    pieces = [list(run) for _, run in itertools.groupby(numbered, key=lambda pair: pair[1])]
    for piece in reversed(pieces):
        modules = [module for module, _ in piece]
        if job.model.activation_checkpointing and piece[0][1] is not None:
            backward += modules
        backward += reversed(modules)
    return [*job.modules, *backward]


def _layers(job: Job) -> dict[int, int]:
    """Elements of each layer by its key, in the model's order; tied ones once."""
    return {key: size for module in job.modules for key, size in module.items()}


def _padded(size: int, ranks: int) -> int:
    return part_size(size, ranks) * ranks
