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
from alto_ds.checkpoint.loading import load_universal, set_rates
from alto_ds.checkpoint.ranks import CheckpointError, Ranks
from alto_ds.checkpoint.saving import REMOVING
from alto_ds.checkpoint.shape import Shape, problem_of_count, shape_of_engine, shape_of_files
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


def resume(engine: Any, folder: Path, fresh_states: Any = None) -> Resumed | None:
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
        engine: DeepSpeed's engine. One that has been stepped is refused where the checkpoint is
            converted.
        folder: of the checkpoints; the ranks share it.
        fresh_states: what the new states are for, such as the optimizer's settings; None where
            none are new. Then weights, schedule and counters are loaded only, with the optimizer's
            states and settings as they are in the engine; but all is loaded from a checkpoint in
            whose ``client_state`` "fresh_states" equals this. So a run that saves that goes on
            with its new states when the same command starts it again. A schedule where there was
            none starts at 0.

    Returns:
        What was loaded; None where the folder has no checkpoint at all.

    Raises:
        CheckpointError: on all ranks, where there are checkpoints and none is whole, or it cannot
            be converted or give its weights alone.
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
        fresh = bool(fresh_states) and fresh_states != ranks.first(lambda: _fresh(folder / tag))
        shape, own = ranks.first(lambda: _shape(folder / tag)), shape_of_engine(engine)
        if fresh:
            _check_fresh(folder / tag, shape, own)
        states = "with new optimizer states" if fresh else "with all optimizer states"
        if shape is not None and (not shape.fits(own) or (fresh and shape.stage > 0)):
            _say([f"{tag} was written on {shape}; it is converted to {own}, {states}"], ranks)
            return Resumed(tag, _convert(engine, ranks, folder, tag, not fresh), skipped)
    with standing_in(engine, SafeReader(engine.checkpoint_engine)):
        path, client_state = engine.load_checkpoint(
            str(folder), tag=tag, load_optimizer_states=not fresh
        )
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder / tag}.")
    if fresh and engine.lr_scheduler is not None:
        set_rates(engine)
    return Resumed(tag, client_state, skipped)


def _shape(checkpoint: Path) -> Shape | None:
    """None where the files do not tell; then only DeepSpeed may know them."""
    try:
        return shape_of_files(checkpoint)
    except CheckpointError:
        return None


def _check_fresh(checkpoint: Path, shape: Shape | None, own: Shape) -> None:
    """Refuse checkpoints whose weights cannot be loaded without their states."""
    if shape is None:
        raise CheckpointError(
            f"{checkpoint} does not tell how it was written, such as that of a PipelineModule, and "
            "cannot be loaded with new optimizer states; go on without fresh_states"
        )
    if shape.stage == 0 and (not shape.fits(own) or own.dtype != "float32"):
        raise CheckpointError(
            f"{checkpoint} was written on {shape}, and can be loaded with new optimizer states "
            "only at ZeRO stage 0 in float32; go on without fresh_states"
        )


def _fresh(checkpoint: Path) -> Any:
    """For what the states were new when the run saved; None where they were not."""
    return read(min(checkpoint.glob(MODEL_FILES))).get("fresh_states")


def _convert(engine: Any, ranks: Ranks, folder: Path, tag: str, states: bool) -> dict[str, Any]:
    """Load a checkpoint of another shape; what was converted is removed afterwards."""
    place = folder / f"{REMOVING}universal-{tag}"  # which the next save removes, too
    converted = place / tag

    def remove() -> None:
        ranks.first(lambda: shutil.rmtree(place, ignore_errors=True))

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
            else:
                problem = ranks.first(functools.partial(problem_of_count, folder / name, shape))
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
