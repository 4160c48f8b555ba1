"""Are a checkpoint's files as they were written, and safe to load?"""

from __future__ import annotations

from pathlib import Path

from alto_ds.checkpoint import manifest as manifests
from alto_ds.checkpoint.deepspeed_files import problem_of_archive, read
from alto_ds.checkpoint.manifest import BrokenManifestError, Manifest, problem_of
from alto_ds.checkpoint.ranks import CheckpointError, Ranks

NO_FILES = "it has no files"


def manifest_of(folder: Path) -> Manifest | str | None:
    """The manifest of a checkpoint, why it is broken, or None where there is none."""
    try:
        return manifests.read(folder)
    except BrokenManifestError as error:
        return str(error)


def problem_of_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint is not whole or not safe to load, found by one process alone."""
    manifest = manifest_of(folder)
    if isinstance(manifest, str):
        return manifest
    files = _files_of(folder, manifest)
    return _problem_of_files(folder, manifest, files) if files else NO_FILES


def problem_on_ranks(ranks: Ranks, folder: Path, manifest: Manifest | None) -> str | None:
    """Why a checkpoint is not whole, the same on all ranks; they share its files.

    Args:
        ranks: all must call this together.
        folder: of the checkpoint.
        manifest: of the checkpoint; None where it has none. Then only what its archives say of
            themselves is checked.
    """
    files = ranks.first(lambda: _files_of(folder, manifest))
    problem = _problem_of_files(folder, manifest, files[ranks.number :: ranks.count])
    return first_of(ranks.gather(problem if files else NO_FILES))


def first_of(problems: list[str | None]) -> str | None:
    """The first problem that there is."""
    return next(filter(None, problems), None)


def _files_of(folder: Path, manifest: Manifest | None) -> list[str]:
    """What the manifest lists, and what would be unpickled besides."""
    pickles = {str(path.relative_to(folder)) for path in folder.rglob("*.pt")}
    return sorted(pickles | set(manifest or ()))


def _problem_of_files(folder: Path, manifest: Manifest | None, names: list[str]) -> str | None:
    problem = None
    for name in names:
        if (folder / name).exists() and not (folder / name).is_file():
            problem = problem or f"{name} is no regular file"  # may have no end
        elif manifest is None:
            problem = problem or problem_of_archive(folder / name)
        elif name in manifest:
            problem = problem or problem_of(folder / name, manifest[name])
        if name.endswith(".pt"):
            problem = problem or _problem_of_reading(folder / name)
    return problem


def _problem_of_reading(path: Path) -> str | None:
    try:
        content = read(path)
    except CheckpointError as error:
        return str(error)
    is_deepspeeds = path.name.endswith("_states.pt")
    return (
        f"{path.name} holds no dictionary" if is_deepspeeds and type(content) is not dict else None
    )
