"""How is a file written so that a kill or a power cut never leaves half of it?"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

NEW = ".new"


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a name of this process beside ``path``; at the end it takes that place.

    Who fails or is killed before that leaves the old file, or none.

    Args:
        path: what is to be written, or to be replaced.

    Yields:
        The name to write it under.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}{NEW}")
    try:
        yield new
        flush(new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)  # it may be what has filled the disk
        raise
    flush(path.parent)


def remove_unfinished(paths: Collection[Path]) -> None:
    """Remove what processes that were killed while :func:`replacing` files have left."""
    names = {path.name for path in paths}
    for folder in {path.parent for path in paths}:
        for new in folder.glob(f"*{NEW}"):
            if new.name.removesuffix(NEW).rpartition(".")[0] in names:
                new.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole, in the place of an old one."""
    with replacing(path) as new:
        new.write_text(text)
