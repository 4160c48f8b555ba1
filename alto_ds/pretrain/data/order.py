"""In which order do sequences come? From the seed alone, the same for any number of ranks."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 16  # numbers that become Python's own at once


def micro_batches(
    sequences: Iterator[Any],
    read: Callable[[Any], Tensor],
    batch_size: int,
    gas: int,
    rank: int,
    world_size: int,
) -> Iterator[Tensor]:
    """This rank's micro batches. ``sequences`` is that of all ranks; ``read`` is called on few."""
    micro = batch_size // gas // world_size
    while True:
        batch = list(itertools.islice(sequences, batch_size))
        for accumulated in range(gas):
            start = (accumulated * world_size + rank) * micro
            yield torch.stack([read(sequence) for sequence in batch[start : start + micro]])


def permutation(total: int, seed: int) -> Tensor:
    """Numbers below ``total``, int64, in an order that depends on both alone."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def shuffled(total: int, start: int, seed: int) -> Iterator[int]:
    """Numbers below ``total``, each once in an epoch, from the ``start``-th of all epochs on."""
    for epoch in itertools.count(start // total):
        first = start % total if epoch == start // total else 0
        for block in permutation(total, seed + epoch)[first:].split(BLOCK):
            yield from block.tolist()


def blended(weights: Sequence[Fraction], start: int) -> Iterator[tuple[int, int]]:
    """Take turns between sources so that each has its share after any number of turns.

    The k-th turn of a source with weight w is due at (k + 1/2) / w; all turns are taken in the
    order of these times, equal ones in that of the sources. So the turns from any place on are
    known without those before.

    Args:
        weights: of the sources, above 0, 1 in all.
        start: turns that were taken before.

    Yields:
        Numbers of a source and of its turn, both from 0.
    """
    # By this time at most ``start`` turns were due: n w + 1/2 of each source.
    time = Fraction(max(start - len(weights), 0))
    taken = [int(time * weight + Fraction(1, 2)) for weight in weights]
    due = [
        (Fraction(2 * turn + 1, 2) / weight, source, turn)
        for source, (weight, turn) in enumerate(zip(weights, taken, strict=True))
    ]
    heapq.heapify(due)
    for number in itertools.count(sum(taken)):
        when, source, turn = due[0]
        if number >= start:
            yield source, turn
        heapq.heapreplace(due, (when + 1 / weights[source], source, turn + 1))
