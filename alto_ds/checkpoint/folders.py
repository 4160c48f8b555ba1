"""Which checkpoints are in a folder, and which is the newest?"""

from __future__ import annotations

import re
from pathlib import Path

from alto_ds.checkpoint import manifest as manifests

LATEST = "latest"


def number_of(tag: str) -> int | None:
    """The number at the end of a checkpoint's name, which says what is newer; None without one."""
    digits = re.search(r"\d+$", tag)
    return None if digits is None else int(digits[0])


def newest_first(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, broken ones included.

    They are the folders whose name ends in a number and does not begin with a dot. What ``latest``
    names is a checkpoint under any name. Folders without a manifest or a file of ``torch.save``
    are none, and neither are converted ones, which hold a folder ``zero``.
    """
    try:
        found = [path.name for path in folder.iterdir() if _is_checkpoint(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbered = [(number, name) for name in found if (number := number_of(name)) is not None]
    names = [name for _, name in sorted(numbered, reverse=True)]
    latest = latest_in(folder)
    return names if latest in names or latest not in found else [*names, latest]


def _is_checkpoint(path: Path) -> bool:
    if path.name[0] == "." or not path.is_dir() or (path / "zero").is_dir():
        return False
    return (path / manifests.FILE).exists() or any(path.glob("*.pt"))


def latest_in(folder: Path) -> str | None:
    """What ``latest`` names; None where it is not there."""
    try:
        return (folder / LATEST).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
