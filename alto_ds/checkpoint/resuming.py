"""Which checkpoint is the newest whole one? Load it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from alto_ds.checkpoint import manifest as manifests
from alto_ds.checkpoint.deepspeed_files import (
    SafeReader,
    check_engine,
    missing,
    problem_of_archive,
    problem_of_pickle,
    standing_in,
)
from alto_ds.checkpoint.folders import LATEST, latest_in, newest_first
from alto_ds.checkpoint.manifest import BrokenManifestError, Manifest, problem_of
from alto_ds.checkpoint.ranks import CheckpointError, Ranks


class Resumed(NamedTuple):
    """What was loaded.

    Attributes:
        tag: name of the checkpoint.
        client_state: what was saved with it, and what DeepSpeed adds.
        skipped: newer checkpoints that were not taken, and why.
    """

    tag: str
    client_state: dict[str, Any]
    skipped: dict[str, str]


def exist(folder: Path) -> bool:
    """Whether this process sees a checkpoint in the folder, whole or broken."""
    return bool(newest_first(folder)) or latest_in(folder) is not None


def resume(engine: Any, folder: Path) -> Resumed | None:
    """Load the newest whole checkpoint into the engine. All ranks must call this together.

    Every file is compared with the manifest first, shared among the ranks. Where one differs, all
    ranks go back to the checkpoint before; rank 0 says on stderr what was skipped and why. A
    checkpoint without a manifest is taken only where no other is whole.

    Files are unpickled with ``weights_only=True``, and refused where they name a function or class
    besides those that DeepSpeed writes. A checkpoint from a stranger may still be wrong in its
    numbers.

    Args:
        engine: DeepSpeed's engine, not yet stepped.
        folder: of the checkpoints; the ranks share it.

    Returns:
        What was loaded; None where the folder has no checkpoint at all.

    Raises:
        CheckpointError: on all ranks, where there are checkpoints and none is whole.
    """
    check_engine(engine)
    with Ranks() as ranks:
        names, latest = ranks.first(lambda: (newest_first(folder), latest_in(folder)))
        if not names and latest is None:
            return None
        tag, verified, skipped = _newest_whole(engine, ranks, folder, names)
    _say([f"skipped {name}: {reason}" for name, reason in skipped.items()], ranks)
    if tag is None:
        broken = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise CheckpointError(
            f"no checkpoint in {folder} can be loaded ({broken or f'{LATEST} names {latest!r}'}). "
            "Bring one of them back, or remove that folder to start anew."
        )
    if not verified:
        _say([f"{tag} has no {manifests.FILE}, so it could not be verified"], ranks)
    if latest != tag:
        _say([f"{LATEST} {f'names {latest}' if latest else 'is missing'}"], ranks)
    _say([f"resuming from {folder / tag}"], ranks)
    with standing_in(engine, SafeReader(engine.checkpoint_engine)):
        path, client_state = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder / tag}.")
    return Resumed(tag, client_state, skipped)


def _newest_whole(
    engine: Any, ranks: Ranks, folder: Path, names: list[str]
) -> tuple[str | None, bool, dict[str, str]]:
    """Its name, or None; whether it has a manifest; the newer ones and why they are not taken."""
    found = ranks.first(lambda: {name: _manifest_of(folder / name) for name in names})
    unverified = [name for name in names if found[name] is None]
    skipped: dict[str, str] = {}
    for name in [*(name for name in names if name not in unverified), *unverified]:
        manifest = found[name]
        if isinstance(manifest, str):
            problem: str | None = manifest
        else:
            problem = problem_on_ranks(ranks, folder / name, manifest)
            problem = problem or _first(ranks.gather(missing(engine, folder, name)))
        if problem is None:
            newer = names[: names.index(name)]
            reason = f"it has no {manifests.FILE}, and {name} has been verified"
            reasons = {other: skipped.get(other, reason) for other in newer}
            return name, manifest is not None, reasons
        skipped[name] = problem
    return None, False, skipped


def _manifest_of(folder: Path) -> Manifest | str | None:
    """The manifest of a checkpoint, why it is broken, or None where there is none."""
    try:
        return manifests.read(folder)
    except BrokenManifestError as error:
        return str(error)


def problem_on_ranks(ranks: Ranks, folder: Path, manifest: Manifest | None) -> str | None:
    """Why a checkpoint is not whole, the same on all ranks; they share its files.

    Args:
        ranks: all must call this together.
        folder: of the checkpoint.
        manifest: of the checkpoint; None where it has none. Then only what its archives say of
            themselves is checked.
    """
    if manifest is None:
        files = ranks.first(lambda: sorted(str(path) for path in folder.rglob("*.pt")))
        problem = None if files else "it has no files"
        for path in map(Path, files[ranks.number :: ranks.count]):
            problem = problem or problem_of_archive(path) or problem_of_pickle(path)
    else:
        problem = None
        for name in sorted(manifest)[ranks.number :: ranks.count]:
            problem = problem or problem_of(folder / name, manifest[name])
            if name.endswith(".pt"):
                problem = problem or problem_of_pickle(folder / name)
    return _first(ranks.gather(problem))


def _first(problems: list[str | None]) -> str | None:
    return next(filter(None, problems), None)


def _say(lines: list[str], ranks: Ranks) -> None:
    for line in lines:
        if ranks.number == 0:
            print(f"alto_ds.checkpoint: {line}", file=sys.stderr, flush=True)
