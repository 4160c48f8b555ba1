"""Which checkpoint is the newest whole one? Load it."""

from __future__ import annotations

import functools
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from alto_ds.checkpoint import manifest as manifests
from alto_ds.checkpoint.converting import convert
from alto_ds.checkpoint.deepspeed_files import (
    MODEL_FILES,
    SafeReader,
    check_engine,
    missing,
    read,
    standing_in,
)
from alto_ds.checkpoint.folders import LATEST, latest_in, newest_first
from alto_ds.checkpoint.loading import load_universal
from alto_ds.checkpoint.ranks import CheckpointError, Ranks
from alto_ds.checkpoint.saving import REMOVING
from alto_ds.checkpoint.shape import Shape, shape_of_engine, shape_of_files
from alto_ds.checkpoint.verifying import first_of, manifest_of, problem_on_ranks

CONVERSION_TIMEOUT = timedelta(hours=24)  # of a large model, by one process


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


def resume(engine: Any, folder: Path, fresh_states: bool = False) -> Resumed | None:
    """Load the newest whole checkpoint into the engine. All ranks must call this together.

    Where it was written for another number of ranks, ZeRO stage or precision, rank 0 converts it
    and says so; see :func:`alto_ds.checkpoint.convert` for what cannot be converted.

    Every file is compared with the manifest first, shared among the ranks. Where one differs, all
    ranks go back to the checkpoint before; rank 0 says on stderr what was skipped and why. A
    checkpoint without a manifest is taken only where no other is whole.

    Files are unpickled with ``weights_only=True``, and refused where they name a function or class
    besides those that DeepSpeed writes. A checkpoint from a stranger may still be wrong in its
    numbers.

    Args:
        engine: DeepSpeed's engine, not yet stepped.
        folder: of the checkpoints; the ranks share it.
        fresh_states: load weights, schedule and counters only, with the optimizer's states and
            settings as they are in the engine; but load all from a checkpoint in whose
            ``client_state`` "fresh_states" is true. So a run that saves that goes on with its new
            states when the same command starts it again.

    Returns:
        What was loaded; None where the folder has no checkpoint at all.

    Raises:
        CheckpointError: on all ranks, where there are checkpoints and none is whole, or it cannot
            be converted.
    """
    check_engine(engine)
    with Ranks(patience=CONVERSION_TIMEOUT) as ranks:
        names, latest = ranks.first(lambda: (newest_first(folder), latest_in(folder)))
        if not names and latest is None:
            return None
        tag, verified, skipped = _newest_whole(engine, ranks, folder, names)
        _say([f"skipped {name}: {reason}" for name, reason in skipped.items()], ranks)
        if tag is None:
            broken = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise CheckpointError(
                f"no checkpoint in {folder} can be loaded "
                f"({broken or f'{LATEST} names {latest!r}'}). "
                "Bring one of them back, or remove that folder to start anew."
            )
        if not verified:
            _say([f"{tag} has no {manifests.FILE}, so it could not be verified"], ranks)
        if latest != tag:
            _say([f"{LATEST} {f'names {latest}' if latest else 'is missing'}"], ranks)
        _say([f"resuming from {folder / tag}"], ranks)
        fresh_states = fresh_states and not ranks.first(lambda: _is_fresh(folder / tag))
        shape, own = ranks.first(lambda: _shape(folder / tag)), shape_of_engine(engine)
        if shape is not None and (fresh_states or not shape.fits(own)):
            states = "with new optimizer states" if fresh_states else "with all optimizer states"
            _say([f"{tag} was written on {shape}; it is converted to {own}, {states}"], ranks)
            return Resumed(tag, _convert(engine, ranks, folder, tag, not fresh_states), skipped)
    with standing_in(engine, SafeReader(engine.checkpoint_engine)):
        path, client_state = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder / tag}.")
    return Resumed(tag, client_state, skipped)


def _shape(checkpoint: Path) -> Shape | None:
    """None where the files do not tell; then only DeepSpeed may know them."""
    try:
        return shape_of_files(checkpoint)
    except CheckpointError:
        return None


def _is_fresh(checkpoint: Path) -> bool:
    """Whether the run had new states when it saved."""
    return bool(read(min(checkpoint.glob(MODEL_FILES))).get("fresh_states", False))


def _convert(engine: Any, ranks: Ranks, folder: Path, tag: str, states: bool) -> dict[str, Any]:
    """Load a checkpoint of another shape; what was converted is removed afterwards."""
    converted = folder / f"{REMOVING}universal-{tag}"  # which the next save removes, too

    def remove() -> None:
        ranks.first(lambda: shutil.rmtree(converted, ignore_errors=True))

    remove()
    try:
        ranks.first(lambda: convert(folder / tag, converted))
        loaded = load_universal(engine, converted, states)
    except CheckpointError:
        remove()
        raise
    remove()
    return loaded


def _newest_whole(
    engine: Any, ranks: Ranks, folder: Path, names: list[str]
) -> tuple[str | None, bool, dict[str, str]]:
    """Its name, or None; whether it has a manifest; the newer ones and why they are not taken."""
    found = ranks.first(lambda: {name: manifest_of(folder / name) for name in names})
    unverified = [name for name in names if found[name] is None]
    skipped: dict[str, str] = {}
    for name in [*(name for name in names if name not in unverified), *unverified]:
        manifest = found[name]
        if isinstance(manifest, str):
            problem: str | None = manifest
        else:
            problem = problem_on_ranks(ranks, folder / name, manifest)
        if problem is None:
            shape = ranks.first(functools.partial(_shape, folder / name))
            if shape is None or shape.fits(shape_of_engine(engine)):
                problem = first_of(ranks.gather(missing(engine, folder, name)))
        if problem is None:
            newer = names[: names.index(name)]
            reason = f"it has no {manifests.FILE}, and {name} has been verified"
            reasons = {other: skipped.get(other, reason) for other in newer}
            return name, manifest is not None, reasons
        skipped[name] = problem
    return None, False, skipped


def _say(lines: list[str], ranks: Ranks) -> None:
    for line in lines:
        if ranks.number == 0:
            print(f"alto_ds.checkpoint: {line}", file=sys.stderr, flush=True)
