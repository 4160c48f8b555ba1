"""How does a checkpoint become whole before anything names it?"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alto_ds.checkpoint import manifest as manifests
from alto_ds.checkpoint.deepspeed_files import (
    Recorder,
    check_engine,
    optimizers_of,
    standing_in,
    unsafe_names,
)
from alto_ds.checkpoint.folders import LATEST, newest_first, number_of
from alto_ds.checkpoint.manifest import BrokenManifestError, Manifest, entry_of, has_all_sizes
from alto_ds.checkpoint.ranks import CheckpointError, Ranks
from alto_ds.checkpoint.verifying import problem_on_ranks
from alto_ds.files import flush, write_text

WRITING, REMOVING = ".writing-", ".removing-"
FULL = (errno.ENOSPC, errno.EDQUOT)


def save(
    engine: Any,
    folder: Path,
    tag: str,
    client_state: dict[str, Any] | None = None,
    keep: int = 2,
    keep_every: int | None = None,
) -> None:
    """Write a checkpoint, whole or not at all. All ranks must call this together.

    It is written under a name that nothing reads, brought to the disk, and only then renamed and
    named by ``latest``. Until then the checkpoint before stays as it is and is named.

    Args:
        engine: DeepSpeed's engine.
        folder: of the checkpoints; the ranks share it.
        tag: name of the checkpoint, which ends in a number; a larger number is newer.
        client_state: what :func:`alto_ds.checkpoint.resume` returns: numbers, strings, tensors,
            lists and dictionaries of them.
        keep: number of the newest whole checkpoints that stay; older ones are removed.
        keep_every: those whose number is a multiple of it stay for ever. Checkpoints that are
            broken or have no manifest are neither counted nor removed.

    Raises:
        ValueError: ``tag``, ``keep`` or ``keep_every`` is none of the above.
        CheckpointError: on all ranks, where one of them could not write, or ``tag`` is there
            already and whole. What was begun is removed.
        FloatingPointError: on all ranks, where ALTO has found numbers that are not finite, which
            on accelerators it says one step late.
    """
    number = number_of(tag)
    if number is None or Path(tag).name != tag or tag.startswith("."):
        raise ValueError(f'tag={tag!r} must be a name that ends in a number, such as "step100"')
    if keep < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep={keep} and keep_every={keep_every} must be at least 1")
    check_engine(engine)
    unfinished = folder / f"{WRITING}{tag}"
    with Ranks(FloatingPointError) as ranks:
        ranks.each(lambda: _raise_nonfinite(engine))
    with Ranks() as ranks:
        ranks.together(lambda: _check_client_state(client_state or {}))
        _make_way(ranks, folder / tag)
        try:
            ranks.first(lambda: _prepare(folder, unfinished))
            written = ranks.together(lambda: _write(engine, unfinished, client_state or {}))
            ranks.first(lambda: _publish(folder, tag, unfinished, written))
        except CheckpointError:
            ranks.first(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            raise
        ranks.first(lambda: _remove_old(folder, tag, keep, keep_every))


def _raise_nonfinite(engine: Any) -> None:
    for optimizer in optimizers_of(engine):
        if hasattr(optimizer, "raise_nonfinite"):
            optimizer.raise_nonfinite()


def _check_client_state(client_state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(client_state, buffer)
    buffer.seek(0)
    names = unsafe_names(buffer)
    if names:
        raise CheckpointError(
            f"client_state holds {', '.join(names)}, which resume() would refuse to load; use "
            "numbers, strings, tensors, lists and dictionaries."
        )


def _make_way(ranks: Ranks, path: Path) -> None:
    """Move a broken checkpoint of the same name aside; refuse to replace a whole one."""

    def look() -> tuple[bool, Manifest | None]:
        try:
            return path.exists(), manifests.read(path)
        except BrokenManifestError:
            return True, None

    exists, manifest = ranks.first(look)
    if not exists:
        return
    if manifest is not None and problem_on_ranks(ranks, path, manifest) is None:
        raise CheckpointError(
            f"{path} is there already and whole, and is not overwritten; call "
            "alto_ds.checkpoint.resume first, or save to another folder."
        )
    aside = path.with_name(f"{path.name}.broken")

    def move() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        _say(f"moved {path.name}, which is not whole or has no manifest, to {aside.name}")

    ranks.first(move)


def _prepare(folder: Path, unfinished: Path) -> None:
    """Remove what killed processes have left, and make the folder to write to."""
    with naming(folder):
        for prefix in (WRITING, REMOVING):
            for left in folder.glob(f"{prefix}*"):
                shutil.rmtree(left)
        unfinished.mkdir(parents=True)


def _write(engine: Any, unfinished: Path, client_state: dict[str, Any]) -> Manifest:
    """Let DeepSpeed write; returns the files that this rank has written."""
    recorder = Recorder(engine.checkpoint_engine, unfinished)
    with standing_in(engine, recorder):
        try:
            engine.save_checkpoint(
                str(unfinished.parent), unfinished.name, client_state, save_latest=False
            )
        except OSError as error:
            # Of files that DeepSpeed copies by itself. The other ranks go on to these two.
            recorder.error = recorder.error or error
            if engine._optimizer_has_ckpt_event_epilogue():
                engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
    if recorder.error is not None:
        with naming(unfinished.parent):
            raise recorder.error
    return recorder.entries


def _publish(folder: Path, tag: str, unfinished: Path, written: list[Manifest]) -> None:
    """Complete what all ranks have written, and give it its name."""
    with naming(folder):
        seal(unfinished, {name: entry for files in written for name, entry in files.items()})
        # What needs space comes first. Both renames need none.
        new = folder / f".{LATEST}.new"
        write_text(new, tag)
        unfinished.rename(folder / tag)
        flush(folder)
        new.replace(folder / LATEST)
        flush(folder)


def seal(unfinished: Path, manifest: Manifest) -> None:
    """Bring all files of a folder to the disk, and write their manifest.

    Args:
        unfinished: the folder.
        manifest: of the files that are on the disk already.
    """
    for path in unfinished.rglob("*"):  # such as what DeepSpeed copies from NVMe
        name = str(path.relative_to(unfinished))
        if path.is_dir() or name not in manifest:
            flush(path)
        if path.is_file() and name not in manifest:
            manifest[name] = entry_of(path)
    for name in manifest:
        (unfinished / name).stat()  # fails where somebody is removing the folder
    manifests.write(unfinished, manifest)
    flush(unfinished)


def _remove_old(folder: Path, tag: str, keep: int, keep_every: int | None) -> None:
    """Remove all whole checkpoints but the newest, and those that stay for ever.

    What is newer than ``tag``, the one just written, was skipped when the run was resumed.
    """
    whole = 0
    with naming(folder):  # which somebody may remove even now
        names = newest_first(folder)
        if tag not in names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / tag))
    for name in names[names.index(tag) :]:
        number = number_of(name)
        stays = number is None or (keep_every is not None and number % keep_every == 0)
        if (stays and whole >= keep) or not has_all_sizes(folder / name):
            continue
        whole += 1
        if whole > keep:
            try:
                # First out of sight, so that a killed process leaves no broken one.
                shutil.rmtree((folder / name).rename(folder / f"{REMOVING}{name}"))
            except OSError as error:
                _say(f"{folder / name} is old and cannot be removed: {error.strerror}")


class naming(contextlib.AbstractContextManager[None]):
    """Turns an error into a CheckpointError that names the folder and says if its disk is full."""

    def __init__(self, folder: Path, writer: str = "PyTorch's writer") -> None:
        self._folder, self._writer = folder, writer

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if not isinstance(error, Exception):
            return
        if not self._folder.is_dir():
            raise CheckpointError(
                f"{self._folder} is gone: it was removed while a checkpoint was written to it, or "
                "its disk is not mounted any more. Bring it back to go on from the last checkpoint."
            ) from error
        if getattr(error, "errno", None) in FULL or _is_full(self._folder):
            reason = "no space left on device"
        elif isinstance(error, OSError):
            reason = f"{error.strerror}: {error.filename}"
        else:
            cause: BaseException = error
            while cause.__context__ is not None:  # PyTorch's writer fails once more while it closes
                cause = cause.__context__
            reason = f"{self._writer} failed ({type(cause).__name__}: {str(cause)[:300]})"
        raise CheckpointError(
            f"the checkpoint could not be written to {self._folder}: {reason}. What was begun is "
            "removed; the checkpoints before it are as they were."
        ) from error


def _is_full(folder: Path) -> bool:
    """Whether the folder takes no MiB more; PyTorch's writer does not say why it failed."""
    probe = folder / f".probe-{dist.get_rank() if dist.is_initialized() else os.getpid()}"
    try:
        write_text(probe, " " * (1 << 20))
    except OSError as error:
        return error.errno in FULL
    finally:
        with contextlib.suppress(OSError):
            os.unlink(probe)
    return False


def _say(line: str) -> None:
    print(f"alto_ds.checkpoint: {line}", file=sys.stderr, flush=True)
