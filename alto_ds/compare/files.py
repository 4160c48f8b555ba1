"""What is in the output folder?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result_file(folder: Path, key: str) -> Path:
    """A finished run."""
    return folder / "runs" / f"{key}.json"


def curve_file(folder: Path, key: str) -> Path:
    """Its loss at each step."""
    return folder / "curves" / f"{key}.csv"


def ratios_file(folder: Path, key: str) -> Path:
    """The trust ratios of its layers at some steps, where its optimizer has them."""
    return folder / "ratios" / f"{key}.csv"


def read_result(folder: Path, key: str) -> dict[str, Any] | None:
    """What a run has left; None where it has not been finished."""
    path = result_file(folder, key)
    return json.loads(path.read_text()) if path.exists() else None
