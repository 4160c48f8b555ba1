"""A run's held-out tokens, kept in its folder: any of its checkpoints can be evaluated on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from alto_ds.files import replacing

FILE = "held_out.npy"


def write_held_out(run: Path, sequences: Tensor) -> None:
    """Write them.

    Args:
        run: its folder.
        sequences: ``[sequences, seq_length]`` tokens, int64, on the CPU.
    """
    with replacing(run / FILE) as new, new.open("wb") as file:
        np.save(file, sequences.numpy().astype(np.int32))


def read_held_out(name: str) -> list[list[int]]:
    """The tokens of each sequence.

    Args:
        name: a run's folder, or one of its checkpoints.

    Raises:
        ValueError: there are none.
    """
    for folder in (Path(name), Path(name).parent.parent):
        if (folder / FILE).is_file():
            return np.load(folder / FILE).tolist()
    raise ValueError(f"{name} is no run that has {FILE}; name a text by --text")
