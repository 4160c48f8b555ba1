"""How does ZeRO cut layers among ranks? Pure functions of sizes and ranks, in elements.

:mod:`alto_ds.layout.zero` applies them to the tensors of a real engine, :mod:`alto_ds.plan` to the
sizes of a model that nobody has made yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """A range of one layer in a rank's flat tensor.

    Attributes:
        layer: its number.
        offset: where the range begins in the flat tensor.
        length: elements of it.
        start: where it begins in the layer.
    """

    layer: int
    offset: int
    length: int
    start: int


def slice_size(sizes: Sequence[int], ranks: int) -> int:
    """Elements of each rank's slice of a flat buffer: ZeRO-1 and ZeRO-2.

    DeepSpeed pads the buffer to a multiple of 2 · ranks, for NCCL's alignment.
    """
    return -(-sum(sizes) // (2 * ranks)) * 2


def part_size(size: int, ranks: int) -> int:
    """Elements of each rank's part of one layer, padding included: ZeRO-3."""
    return -(-size // ranks)


def pieces_of_slice(places: Iterable[tuple[int, int]], size: int, rank: int) -> Iterator[Piece]:
    """What is in a rank's slice of a flat buffer.

    Args:
        places: of each layer, where it begins in the buffer, and its size.
        size: of the slice.
        rank: whose slice.
    """
    low, high = rank * size, (rank + 1) * size
    for layer, (begin, length) in enumerate(places):
        first, last = max(begin, low), min(begin + length, high)
        if first < last:
            yield Piece(layer, first - low, last - first, first - begin)


def pieces_of_parts(parts: Iterable[tuple[int, int, int]]) -> Iterator[Piece]:
    """What is in a rank's parts of layers, in a row; the last ranks' parts end in padding.

    Args:
        parts: of each layer, its size, that of a part, and the rank among those that share it.
    """
    offset = 0
    for layer, (size, part, rank) in enumerate(parts):
        start = rank * part
        length = min(max(size - start, 0), part)
        if length > 0:
            yield Piece(layer, offset, length, start)
        offset += part
