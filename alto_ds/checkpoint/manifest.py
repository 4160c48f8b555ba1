"""Which files make up a checkpoint, and are they as they were written?

A manifest is ``manifest.json`` in the checkpoint's folder: the size in bytes and the CRC-32 of
each file, and a CRC-32 of that table. A CRC-32 finds every change of up to 32 bits in a row and
misses one of 4 billion others. It does not stop who changes the manifest, too.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import NamedTuple

from alto_ds.files import write_text

FILE = "manifest.json"
BLOCK = 1 << 20  # bytes that stay in a core's cache


class Entry(NamedTuple):
    """What a file must be.

    Attributes:
        size: bytes.
        crc32: of all bytes.
    """

    size: int
    crc32: int


Manifest = dict[str, Entry]  # by the path in the checkpoint's folder


class BrokenManifestError(ValueError):
    """A manifest that is not as it was written."""


def entry_of(path: Path) -> Entry:
    """Read a file and describe it."""
    size = crc32 = 0
    block = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc32 = size + count, zlib.crc32(block[:count], crc32)
    return Entry(size, crc32)


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint into its folder."""
    table = json.dumps(manifest, sort_keys=True)
    crc32 = zlib.crc32(table.encode())
    write_text(folder / FILE, f'{{"crc32": {crc32}, "files": {table}}}\n')


def read(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None where there is none.

    Raises:
        BrokenManifestError: it is not as it was written, or names what is not in the folder.
    """
    if (folder / FILE).exists() and not (folder / FILE).is_file():
        raise BrokenManifestError(f"{FILE} is no regular file")
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        table = found["files"]
        if found["crc32"] != zlib.crc32(json.dumps(table, sort_keys=True).encode()):
            raise ValueError("checksum")
        for name in table:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError("outside")
        return {name: Entry(*values) for name, values in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenManifestError(f"{FILE} is not as it was written") from error


def problem_of(path: Path, entry: Entry, contents: bool = True) -> str | None:
    """Why a file is not what its entry says; None where it is.

    Args:
        path: of the file.
        entry: what it must be.
        contents: whether to read it whole for its checksum; its size is always compared.
    """
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{path.name} has {size} bytes in place of {entry.size}"
        if contents and entry_of(path) != entry:
            return f"{path.name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def has_all_sizes(folder: Path) -> bool:
    """Whether a checkpoint has a manifest and all its files the right size; reads no contents."""
    try:
        manifest = read(folder)
        return manifest is not None and all(
            (folder / name).stat().st_size == entry.size for name, entry in manifest.items()
        )
    except (OSError, BrokenManifestError):
        return False
