"""How are an engine's states saved and found again? Knows nothing of text or models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded, raised on every rank alike."""


def exist(folder: Path) -> bool:
    """Whether this process sees a finished checkpoint in the folder."""
    return (folder / "latest").is_file()


def found(folder: Path) -> bool:
    """Whether rank 0 sees a finished checkpoint in the folder. All ranks must call this together.

    Returns:
        The same on every rank, also where the folder is late to appear on another node.
    """
    answer = [exist(folder)]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def load(engine: Any, folder: Path) -> dict[str, Any]:
    """Load the latest checkpoint into the engine. All ranks must call this together.

    Returns:
        The client state that was saved with it.

    Raises:
        CheckpointError: on all ranks, where DeepSpeed finds no checkpoint under the latest's name.
    """
    path, client_state = engine.load_checkpoint(str(folder))
    if path is None:
        raise CheckpointError(
            f"the checkpoint that {folder}/latest names cannot be loaded; write another folder's "
            "name into that file, or remove it to start anew."
        )
    return client_state


def save(engine: Any, folder: Path, step: int, client_state: dict[str, Any]) -> None:
    """Write a checkpoint and remove all but the newest. All ranks must call this together.

    Args:
        engine: DeepSpeed's engine.
        folder: of the run's checkpoints; the ranks share it.
        step: number of steps done, which names the checkpoint.
        client_state: what :func:`load` returns.
    """
    engine.save_checkpoint(str(folder), tag=f"step{step:07d}", client_state=client_state)
    dist.barrier()
    if dist.get_rank() == 0:
        newest_last = sorted(folder.glob("step*"), key=lambda path: path.stat().st_mtime)
        for old in newest_last[:-KEPT]:
            shutil.rmtree(old)
