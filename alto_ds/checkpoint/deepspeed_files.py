"""How do DeepSpeed's engines write and read files?

DeepSpeed does both by the engine's ``checkpoint_engine``. The two classes here stand in for it.
"""

from __future__ import annotations

import contextlib
import copyreg
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from alto_ds.checkpoint.manifest import Entry, entry_of
from alto_ds.checkpoint.ranks import CheckpointError
from alto_ds.files import flush

# The classes in DeepSpeed's files besides what torch.load(weights_only=True) knows. They are plain
# data: unpickling sets attributes and calls nothing.
SAFE = [DynamicLossScaler, LossScaler, SubparamShape, ZeroStageEnum, fragment_address]

# Python before 3.11.4 pickles a member of an enumeration as a call of getattr(), which no safe
# loader allows; this is what later versions write.
copyreg.pickle(ZeroStageEnum, lambda member: (ZeroStageEnum, (member.value,)))

# What DeepSpeed calls its files: of each rank's part of the optimizer, and of all the rest.
OPTIMIZER_FILES, MODEL_FILES = "*_optim_states.pt", "*_model_states.pt"


def check_engine(engine: Any) -> None:
    """Refuse engines whose files come late, or lie where other ranks do not see them.

    Raises:
        CheckpointError: naming the setting in DeepSpeed's JSON.
    """
    writer = engine.checkpoint_engine
    if type(writer) is not TorchCheckpointEngine:
        raise CheckpointError(
            f"alto_ds.checkpoint cannot tell when the files of DeepSpeed's {type(writer).__name__} "
            'are whole; leave "writer" in "checkpoint", and "datastates_ckpt", out of its JSON.'
        )
    if engine.use_node_local_storage():
        raise CheckpointError(
            'alto_ds.checkpoint needs one folder for all nodes; set "use_node_local_storage" in '
            '"checkpoint" of DeepSpeed\'s JSON to false.'
        )


class Recorder:
    """Writes as the engine's own ``checkpoint_engine``, and notes what came of it.

    An error is kept, not raised: this rank would leave the others in DeepSpeed's collectives.

    Attributes:
        entries: the files that this rank has written, on the disk, by their path in ``folder``.
        error: the first error; nothing is written after it.
    """

    def __init__(self, writer: Any, folder: Path) -> None:
        self._writer, self._folder = writer, folder
        self.entries: dict[str, Entry] = {}
        self.error: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            self._writer.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        try:
            self._writer.save(state_dict, path)
            flush(Path(path))
            self.entries[str(Path(path).relative_to(self._folder))] = entry_of(Path(path))
        except Exception as error:  # of PyTorch's writer, of any type
            self.error = error
            _close_files_of(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def _close_files_of(error: BaseException | None) -> None:
    """Forget what the functions that have failed still hold.

    A file that is open takes its space even after it is removed.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class SafeReader:
    """Reads as the engine's own ``checkpoint_engine``, but executes nothing that a file says."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location=map_location, weights_only=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def read(path: Path) -> Any:
    """Read a file of ``torch.save`` that executes nothing; tensors are read when they are used.

    Raises:
        CheckpointError: the file is broken, or names what :class:`SafeReader` refuses.
    """
    problem = problem_of_pickle(path)
    if problem is not None:
        raise CheckpointError(problem)
    try:
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # wrong bytes make the unpickler raise anything
        raise CheckpointError(f"{path.name} cannot be read: {_first_line(error)}") from error


@contextlib.contextmanager
def standing_in(engine: Any, other: Any) -> Iterator[None]:
    """Let the engine write and read by ``other``."""
    own, engine.checkpoint_engine = engine.checkpoint_engine, other
    try:
        yield
    finally:
        engine.checkpoint_engine = own


def optimizers_of(engine: Any) -> Iterator[Any]:
    """DeepSpeed's wrapper of the optimizer, what is inside it, and so on to the innermost."""
    optimizer = engine.optimizer
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def unsafe_names(file: Path | BinaryIO) -> list[str]:
    """Functions and classes in a file of ``torch.save`` that :class:`SafeReader` refuses.

    The file is disassembled, not executed, and its tensors are not read.
    """
    with torch.serialization.safe_globals(SAFE):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))


def problem_of_pickle(path: Path) -> str | None:
    """Why a file of ``torch.save`` will not be loaded; None where it will."""
    try:
        names = unsafe_names(path)
    except Exception as error:  # wrong bytes make the parsers raise anything
        return f"{path.name} cannot be read: {_first_line(error)}"
    if names:
        return (
            f"{path.name} would run {', '.join(names)} when it is loaded; if you trust it, allow "
            "them by torch.serialization.add_safe_globals"
        )
    return None


def problem_of_archive(path: Path) -> str | None:
    """Why a file of ``torch.save`` is broken by the checksums of its own zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # wrong bytes make the parsers raise anything
        return f"{path.name} cannot be read: {_first_line(error)}"
    return None if bad is None else f"{path.name} is broken at {bad}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def missing(engine: Any, folder: Path, tag: str) -> str | None:
    """Which file is missing that DeepSpeed will want on this rank; it goes on without some."""
    names = [[engine._get_ckpt_name(folder, tag)]]
    if engine.zero_optimization():
        rank = torch.distributed.get_rank(group=engine.optimizer.dp_process_group)
        place = (engine.checkpoint_mp_rank, rank)
        own = engine.bfloat16_enabled()
        names.append(
            [
                engine._get_rank_zero_ckpt_name(folder, tag, *place, bf16_mode)
                for bf16_mode in (own, not own)
            ]
        )
    for wanted in names:
        if not any(Path(name).is_file() for name in wanted):
            return f"{Path(wanted[0]).name} is missing"
    return None
