"""The main job is killed, and loses its disk, and the same command goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

import torch

from alto_ds.checkpoint.folders import latest_in, newest_first
from alto_ds.checkpoint.saving import WRITING
from alto_ds.pretrain.metrics import read_metrics
from tests.faults.harness import tensors_in
from tests.pretrain.forked import Forks, Rank
from tests.pretrain.runs import STEPS, measured, options, weights

FINISHED = "Final held-out perplexity"


class Kills:
    """Kills the ranks of a run at moments drawn by chance.

    Attributes:
        found: what was counted: kills by what was killed, those while saving, and what they cost.
    """

    def __init__(self, forks: Forks, seed: int) -> None:
        self._forks = forks
        self._chance = random.Random(seed)
        self.found: Counter[str] = Counter()

    def run(self, arguments: list[str], output: Path, kills: int, *, saving: bool) -> int:
        """Start a run, kill it and start it again until it ends; returns the number of kills.

        Args:
            arguments: of the main job, the same each time.
            output: the run's folder.
            kills: at most so many.
            saving: kill only while a checkpoint is being written.
        """
        done = 0
        while True:
            before = len(newest_first(output / "checkpoints"))
            ranks = self._forks.start(2, *arguments)
            killed = done < kills and self._kill(ranks, output, saving)
            statuses = self._forks.wait(ranks, 100)
            printed = ranks[0].log.read_text()
            self.found["checkpoints skipped"] += printed.count("alto_ds.checkpoint: skipped")
            if not killed:
                assert ("resuming from" in printed) is (before > 0), printed
                assert statuses == [0, 0], printed[-3000:]
                assert FINISHED in printed
                return done
            done += 1
            whole = newest_first(output / "checkpoints")
            saved = int(whole[0][-7:]) if whole else 0
            self.found["steps repeated"] += max(0, len(_rows(output)) - saved)

    def _kill(self, ranks: list[Rank], output: Path, saving: bool) -> bool:
        """Wait for a moment and kill; False where the run has ended before."""
        target = self._chance.choice(["rank 0", "rank 1", "all ranks"])
        victims = ranks if target == "all ranks" else [ranks[int(target[-1])]]
        if saving:
            first = latest_in(output / "checkpoints")
            skip = self._chance.randrange(3)  # checkpoints to let pass
            self._until(ranks, lambda: _number(output) >= _number_of(first) + skip)
            self._until(ranks, lambda: _is_saving(output))
            time.sleep(self._chance.random() * 0.01)
        else:
            time.sleep(self._chance.random() * 6)
        if any(self._forks.status(rank) is not None for rank in ranks):
            return False
        for rank in victims:
            os.kill(rank.pid, signal.SIGKILL)
        self._until(victims, lambda: False)
        self.found["kills"] += 1
        self.found[f"of {target}"] += 1
        self.found["while saving"] += _is_saving(output)
        return True

    def _until(self, ranks: list[Rank], reached: Callable[[], bool]) -> None:
        """Wait until something is so, or one of the ranks has ended."""
        deadline = time.monotonic() + 100
        while not reached() and all(self._forks.status(rank) is None for rank in ranks):
            assert time.monotonic() < deadline, ranks[0].log.read_text()[-3000:]


def _rows(output: Path) -> list[object]:
    path = output / "metrics.jsonl"
    return list(read_metrics(path)) if path.exists() else []


def _is_saving(output: Path) -> bool:
    return any((output / "checkpoints").glob(f"{WRITING}*"))


def _number_of(tag: str | None) -> int:
    return int(tag[-7:]) if tag else 0


def _number(output: Path) -> int:
    return _number_of(latest_in(output / "checkpoints"))


def assert_equal(left: Path, right: Path) -> None:
    """Metrics, weights and the newest checkpoint's states are the same to the bit."""
    assert measured(left) == measured(right)
    found, expected = weights(left), weights(right)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    name = f"checkpoints/step{STEPS:07d}"
    for path in sorted((right / name).glob("*optim_states.pt")):
        mine, other = (
            list(tensors_in(torch.load(folder / name / path.name, weights_only=False)))
            for folder in (left, right)
        )
        assert len(other) >= 4  # master weights and three states
        assert all(map(torch.equal, mine, other))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The folder of a run that nobody killed, and of no other options than the others'."""
    folder = tmp_path_factory.mktemp("straight")
    began = time.monotonic()
    forks.run(2, *options(folder, "straight", save_interval=1))
    (folder / "seconds").write_text(f"{time.monotonic() - began}")
    return folder


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), pytest.param(60, 2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bitwise(
    straight: Path, tmp_path: Path, forks: Forks, kills: int, seed: int
) -> None:
    killing = Kills(forks, seed)
    left, runs, began = kills, 0, time.monotonic()
    while left:
        output = f"run{runs}"
        # A rank that is killed before all have met leaves the other waiting for so long.
        arguments = options(tmp_path, output, save_interval=1, timeout=20)
        left -= killing.run(arguments, tmp_path / output, min(left, 5), saving=runs % 2 == 0)
        assert_equal(tmp_path / output, straight / "straight")
        runs += 1
        shutil.rmtree(tmp_path / output)
    lost = time.monotonic() - began - runs * float((straight / "seconds").read_text())
    print(dict(killing.found), f"runs: {runs}, seconds lost: {lost:.0f}")
    assert killing.found["while saving"] >= kills * 25 / 60
    assert killing.found["checkpoints skipped"] == 0  # what was being written is not seen at all


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"mounting a tmpfs: {tried.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_run_whose_disk_fills_names_it_and_goes_on_once_there_is_space(
    straight: Path, tmp_path: Path, small_disk: Path, forks: Forks
) -> None:
    arguments = options(tmp_path, "disk/output", save_interval=1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(18 << 20))
    printed = forks.run(2, *arguments, status=2)
    saved = small_disk / "output/checkpoints"
    assert f"could not be written to {saved}: no space left on device" in printed
    assert [path.name for path in saved.glob("*step*")] == newest_first(saved)
    assert latest_in(saved) == newest_first(saved)[0]
    filler.unlink()
    assert FINISHED in forks.run(2, *arguments)
    assert_equal(small_disk / "output", straight / "straight")
