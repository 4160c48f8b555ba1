"""Which code does a task of some settings have?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alto_ds.compare import text, vision
from alto_ds.compare.spec import TaskSettings, TextSettings
from alto_ds.compare.task import Task


def prepare(settings: TaskSettings, seeds: Sequence[int], folder: Path) -> str:
    """Prepare the data once for all runs.

    Args:
        settings: of the task.
        seeds: of all runs.
        folder: for what is prepared.

    Returns:
        A fingerprint of model and data, which tells runs of other tasks apart.

    Raises:
        ValueError: the data cannot be used.
    """
    if isinstance(settings, TextSettings):
        return text.prepare(settings, seeds, folder)
    return vision.fingerprint(settings)


def make_task(settings: TaskSettings, folder: Path) -> Task:
    """The task, on data that :func:`prepare` has put into the folder."""
    if isinstance(settings, TextSettings):
        return text.TextTask(settings, folder)
    return vision.VisionTask(settings)
