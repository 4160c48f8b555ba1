"""What is done to checkpoints. Each case runs on both ranks and returns what JSON can hold."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from alto_ds.checkpoint import save
from alto_ds.checkpoint.manifest import FILE, Manifest, entry_of, read, write
from tests.faults.harness import (
    equal,
    error_of_save,
    first_rank,
    make_engine,
    save_steps,
    snapshot,
    train_step,
    try_resume,
)

MIB = 1 << 20


def truncate(path: Path, chance: random.Random) -> None:
    with open(path, "r+b") as file:
        file.truncate(chance.randrange(1, path.stat().st_size))


def empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncate,
    "emptied": empty,
    "removed": remove,
    "a byte flipped": flip,
}


def damage_each_file(stage: int, with_manifest: bool) -> Callable[[Path], Any]:
    """Each file of the newest checkpoint is damaged; what is resumed, alone and beside another."""

    def case(folder: Path) -> list[dict[str, Any]]:
        before, newest = save_steps(make_engine(stage), folder / "base", range(1, 3))
        if not with_manifest:
            with first_rank() as here:
                if here:
                    (folder / "base/step2" / FILE).unlink()
        files = sorted(path.name for path in (folder / "base/step2").iterdir())
        rows, work = [], folder / "work"
        for number, (file, damage) in enumerate((f, d) for f in files for d in [*DAMAGES, "none"]):
            chance = random.Random(f"{stage} {number}")
            with first_rank() as here:
                if here:
                    shutil.rmtree(work, ignore_errors=True)
                    shutil.copytree(folder / "base/step2", work / "step2")
                    (work / "latest").write_text("step2")
                    if damage != "none":
                        DAMAGES[damage](work / "step2" / file, chance)
            engine = make_engine(stage)
            fresh = snapshot(engine)
            states = {"step1": before, "step2": newest, "a new start": fresh}
            alone = outcome(engine, work, states)
            with first_rank() as here:
                if here:
                    shutil.copytree(folder / "base/step1", work / "step1")
            loaded: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(loaded, alone["holds"] != "refused")
            if any(loaded):  # on one rank only, it is an error that the test shows
                engine = make_engine(stage)
            beside = outcome(engine, work, states)
            rows.append({"file": file, "damage": damage, "alone": alone, "beside": beside})
            if damage == "none" and file != files[0]:
                rows.pop()
        return rows

    return case


def outcome(engine: Any, folder: Path, states: dict[str, list[Tensor]]) -> dict[str, str]:
    """Resume: which of the states the engine then holds, and what was said."""
    resumed, error, said = try_resume(engine, folder)
    found = snapshot(engine)
    holds = next((name for name, state in states.items() if equal(found, state)), "WRONG")
    if error:
        return {"holds": "refused" if holds == "a new start" else "WRONG", "said": error}
    if resumed is not None and (resumed.tag, resumed.client_state["step"]) != (
        holds,
        int(holds[-1]),
    ):
        holds = "WRONG"
    return {"holds": holds, "said": said}


def latest(folder: Path) -> dict[str, Any]:
    """``latest`` is removed, names what is not there, is older, or is alone."""
    engine = make_engine(2)
    _, newest = save_steps(engine, folder, range(1, 3))
    found: dict[str, Any] = {}
    for name, text in {"removed": None, "missing": "step7", "older": "step1", "empty": ""}.items():
        with first_rank() as here:
            if here and text is None:
                (folder / "latest").unlink()
            elif here:
                (folder / "latest").write_text(text or "")
        engine = make_engine(2)
        resumed, error, said = try_resume(engine, folder)
        found[name] = [resumed and resumed.tag, equal(snapshot(engine), newest), error, said]
    with first_rank() as here:
        if here:
            for tag in ("step1", "step2"):
                shutil.rmtree(folder / tag)
    found["alone"] = [None, False, *try_resume(engine, folder)[1:]]
    found["no folder"] = [*try_resume(engine, folder / "nothing")]
    return found


def keep(folder: Path) -> list[str]:
    """The newest two stay, multiples of 4, and a broken one, which does not count."""
    engine = make_engine(2)
    save_steps(engine, folder, range(1, 7), keep=2, keep_every=4)
    with first_rank() as here:
        if here:
            empty(next((folder / "step6").glob("*optim*")), random.Random())
    save_steps(engine, folder, range(7, 11), keep=2, keep_every=4)
    dist.barrier()
    return sorted(path.name for path in folder.iterdir())


def same_name(folder: Path) -> dict[str, Any]:
    """A whole checkpoint is never overwritten; a broken one is moved aside."""
    engine = make_engine(2)
    save_steps(engine, folder, range(1, 3))
    again = make_engine(2)
    before = {path.name: entry_of(path) for path in (folder / "step2").iterdir()}
    refused = error_of_save(again, folder, "step2")
    after = {path.name: entry_of(path) for path in (folder / "step2").iterdir()}
    with first_rank() as here:
        if here:
            flip(next((folder / "step2").glob("*optim*")), random.Random(3))
    resumed, *_ = try_resume(again, folder)
    save_steps(again, folder, range(2, 3))
    dist.barrier()
    tag = try_resume(make_engine(2), folder)[0]
    names = sorted(path.name for path in folder.iterdir())
    return {
        "refused": refused,
        "changed": before != after,
        "resumed": resumed and resumed.tag,
        "then": tag and tag.tag,
        "names": names,
    }


class Planted:
    """What an attacker writes: unpickled, it runs a shell command that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def planted(folder: Path) -> dict[str, Any]:
    """Rank 1's optimizer file runs a command when it is unpickled, and the manifest agrees."""
    engine = make_engine(2)
    before, _ = save_steps(engine, folder, range(1, 3))
    proof = folder / "executed"
    with first_rank() as here:
        if here:
            victim = next((folder / "step2").glob("*rank_1_*optim*"))
            with zipfile.ZipFile(victim) as archive:
                records = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(victim, "w") as archive:
                for name, content in records.items():
                    evil = pickle.dumps(Planted(proof), protocol=2)
                    archive.writestr(name, evil if name.endswith("/data.pkl") else content)
            manifest: Manifest = read(folder / "step2") or {}
            write(folder / "step2", manifest | {victim.name: entry_of(victim)})
    engine = make_engine(2)
    resumed, _, said = try_resume(engine, folder)
    return {
        "executed": proof.exists(),
        "tag": resumed and resumed.tag,
        "equal": equal(snapshot(engine), before),
        "said": said,
    }


def on_tmpfs(size: int, case: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The case in a file system of its own of ``size`` bytes, where this may be mounted."""

    def mounted(folder: Path) -> Any:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        may: list[Any] = [None]
        with first_rank() as here:
            if here:
                tried = subprocess.run(command, capture_output=True, text=True, check=False)
                may = [tried.stderr]
        dist.broadcast_object_list(may, src=0)
        if may[0]:
            return {"not permitted": f"mounting a tmpfs: {may[0].strip()}"}
        try:
            return case(folder)
        finally:
            with first_rank() as here:
                if here:
                    # Fails where a file of a save that failed is still open.
                    subprocess.run(["umount", str(folder)], check=True)

    return mounted


def full_disk(folder: Path) -> dict[str, Any]:
    """A disk that the second checkpoint fills; then there is space again."""
    engine = make_engine(2)
    first = save_steps(engine, folder, range(1, 2))[0]
    used = sum(path.stat().st_size for path in (folder / "step1").iterdir())
    results: dict[str, Any] = {}
    for name, left in {"half": used // 2, "nothing": 0}.items():
        with first_rank() as here:
            if here:
                fill(folder, left)
        if name == "half":
            train_step(engine, 2)
        results[name] = error_of_save(engine, folder, "step2", client_state={"step": 2})
        dist.barrier()
        results[f"{name} names"] = sorted(path.name for path in folder.iterdir())
        again = make_engine(2)
        resumed = try_resume(again, folder)[0]
        results[f"{name} resumed"] = [resumed and resumed.tag, equal(snapshot(again), first)]
        with first_rank() as here:
            if here:
                (folder / "filler").unlink()
    results["space"] = error_of_save(engine, folder, "step2", client_state={"step": 2})
    results["latest"] = (folder / "latest").read_text()
    return results


def fill(folder: Path, left: int) -> None:
    """Fill the disk up to some bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - left)))


def read_only(folder: Path) -> dict[str, Any]:
    """The disk becomes read-only; the checkpoint there can still be resumed."""
    engine = make_engine(2)
    save_steps(engine, folder, range(1, 2))
    with first_rank() as here:
        if here:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    error = error_of_save(engine, folder, "step2")
    resumed = try_resume(make_engine(2), folder)[0]
    return {"message": error, "resumed": resumed and resumed.tag}


def one_rank_fails(folder: Path) -> dict[str, Any]:
    """Only rank 1 cannot write: its files may have 4 KiB. It still joins the collectives."""
    results: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        engine = make_engine(stage)
        save_steps(engine, folder / f"{stage}", range(1, 2))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        train_step(engine, 2)
        error = error_of_save(engine, folder / f"{stage}", "step2")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier()
        names = sorted(path.name for path in (folder / f"{stage}").iterdir() if path.is_dir())
        results[f"zero{stage}"] = [
            error,
            names,
            error_of_save(engine, folder / f"{stage}", "step2"),
        ]
    return results


def refused(folder: Path) -> dict[str, str]:
    """What cannot be made whole is refused by name before anything is written."""
    engine = make_engine(2)
    node_local = make_engine(2, checkpoint={"use_node_local_storage": True})
    os.environ.update(CROSS_RANK="0", CROSS_SIZE="1", LOCAL_SIZE="2")  # its writer wants them
    writer = make_engine(3, checkpoint={"writer": {"type": "python"}})
    state = {"options": argparse.Namespace(lr=1)}
    return {
        "writer": error_of_save(writer, folder, "step1"),
        "node local": error_of_save(node_local, folder, "step1"),
        "client state": error_of_save(engine, folder, "step1", client_state=state),
        "tag": error_of_save(engine, folder, "best"),
        "keep": error_of_save(engine, folder, "step1", keep=0),
        "written": " ".join(path.name for path in folder.iterdir()),
    }


def one_rank_raises(folder: Path) -> str:
    """Only rank 1 fails, by an error that nobody foresaw."""
    engine = make_engine(2)
    nothing: dict[str, str] = {}
    if dist.get_rank() == 1:
        engine.basic_optimizer.raise_nonfinite = lambda: nothing["unforeseen"]
    try:
        save(engine, folder, "step1")
    except FloatingPointError as error:
        return str(error)
    return ""


CASES: dict[str, Callable[[Path], Any]] = {
    **{f"damage-zero{stage}": damage_each_file(stage, True) for stage in range(4)},
    "damage-no-manifest": damage_each_file(2, False),
    "latest": latest,
    "keep": keep,
    "same-name": same_name,
    "planted": planted,
    "full-disk": on_tmpfs(2 * MIB, full_disk),
    "read-only": on_tmpfs(2 * MIB, read_only),
    "one-rank-fails": one_rank_fails,
    "one-rank-raises": one_rank_raises,
    "refused": refused,
}
