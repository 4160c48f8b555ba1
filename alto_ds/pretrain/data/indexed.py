"""Megatron's ``.bin/.idx``: documents of tokens on the disk.

``PREFIX.bin`` has the tokens of all sequences, one after the other. ``PREFIX.idx`` has, little
endian: ``MMIDIDX\\0\\0``; uint64 version 1; uint8 code of the tokens' dtype; uint64 number of
sequences; uint64 number of document indices; int32 tokens of each sequence; int64 byte in the
``.bin`` where each begins; int64 number of the first sequence of each document, and at the end
the number of sequences. megatron-core calls it ``IndexedDataset``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.integer[Any]]] = {
    **{1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64},
    8: np.uint16,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """The dtype that Megatron takes for so many tokens."""
    return np.uint16 if vocab_size < 65500 else np.int32


def bin_of(prefix: str) -> Path:
    """The file of the tokens."""
    return Path(f"{prefix}.bin")


def idx_of(prefix: str) -> Path:
    """The file that says where each document is."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes documents of one sequence each, as a context; the end of it writes the index.

    Args:
        bin_path: file of the tokens.
        idx_path: file of the index.
        dtype: of the tokens in the file; one of :data:`DTYPES`.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: type[np.integer[Any]]) -> None:
        self._idx_path = idx_path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = CODES[dtype]
        self._lengths = bytearray()  # 4 bytes a document, where a list would take 36
        self._bin = open(bin_path, "wb")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> IndexedWriter:
        return self

    def add(self, tokens: Sequence[int]) -> None:
        """Append a document."""
        self._bin.write(np.asarray(tokens, dtype=self._dtype).tobytes())
        self._lengths += struct.pack("<i", len(tokens))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bin.close()
        if kind is not None:
            return
        lengths = np.frombuffer(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self._dtype.itemsize
        with open(self._idx_path, "wb") as file:
            header = (MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1)
            file.write(HEADER.pack(*header))
            for part in (lengths, pointers, np.arange(len(lengths) + 1, dtype="<i8")):
                file.write(part.tobytes())


class IndexedDataset:
    """Documents of a ``.bin/.idx`` pair, memory-mapped: only what is asked for is read.

    Args:
        prefix: path of the two files without ``.bin`` and ``.idx``.

    Attributes:
        tokens: all tokens of the file in one row; a view of the disk, read-only.
        starts: ``[documents + 1]`` int64, the place in ``tokens`` where each document begins, and
            their number.

    Raises:
        ValueError: a file is missing, is of another format or version, is cut off, or its numbers
            do not fit each other. It names the file.
    """

    def __init__(self, prefix: str) -> None:
        idx_path, bin_path = idx_of(prefix), bin_of(prefix)
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise ValueError(f"{path} is missing; {prefix} must have a .bin and an .idx")
        dtype, lengths, pointers, documents = _read_index(idx_path)
        starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, dtype=np.int64, out=starts[1:])
        if (
            (lengths < 0).any()
            or not np.array_equal(pointers, starts[:-1] * dtype.itemsize)
            or documents[0] != 0
            or documents[-1] != len(lengths)
            or (np.diff(documents) < 0).any()
        ):
            raise ValueError(f"{idx_path} is broken: its numbers do not fit each other")
        size, expected = bin_path.stat().st_size, int(starts[-1]) * dtype.itemsize
        if size != expected:
            raise ValueError(f"{bin_path} has {size} bytes in place of {expected}")
        self.starts: npt.NDArray[np.int64] = starts[documents]
        # A file without a byte cannot be mapped.
        self.tokens: npt.NDArray[Any] = (
            np.memmap(bin_path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> npt.NDArray[Any]:
        """Tokens of a document."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.tokens[self.starts[number] : self.starts[number + 1]]


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The tokens' dtype; lengths and pointers of the sequences; document indices."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        size = os.fstat(file.fileno()).st_size
        if header[: len(MAGIC)] != MAGIC or len(header) < HEADER.size:
            raise ValueError(
                f"{path} is no index of Megatron's: it does not begin with MMIDIDX; make it by "
                "python -m alto_ds.pretrain.prepare"
            )
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{path} is of version {version}; only version {VERSION} is known")
        if code not in DTYPES:
            known = ", ".join(f"{code} ({dtype.__name__})" for code, dtype in DTYPES.items())
            raise ValueError(f"{path} has tokens of dtype {code}; known are {known}")
        expected = HEADER.size + 12 * sequences + 8 * indices
        if size != expected or indices < 1:
            raise ValueError(f"{path} has {size} bytes in place of {expected}")
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
        pointers = np.fromfile(file, dtype="<i8", count=sequences)
        documents = np.fromfile(file, dtype="<i8", count=indices)
    return np.dtype(DTYPES[code]).newbyteorder("<"), lengths, pointers, documents
