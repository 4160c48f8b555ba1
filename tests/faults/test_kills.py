"""The main job is killed, and loses its disk, and the same command goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import pytest

pytest.importorskip("deepspeed")

import torch

from alto_ds.checkpoint.folders import latest_in, newest_first
from alto_ds.checkpoint.saving import WRITING
from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.metrics import read_metrics
from alto_ds.pretrain.processes import NODE_LAUNCHER
from tests import launcher
from tests.faults.harness import tensors_in
from tests.pretrain.forked import Forks
from tests.pretrain.runs import MODULE, STEPS, measured, options, weights

FINISHED = "Final held-out perplexity"
TIMEOUT = 10  # seconds that a rank waits for one that was killed before it had met the others
JOINING = 6  # the same, where nothing else goes on
Launcher = Callable[[int], list[str]]


class Started(Protocol):
    """A run that was started."""

    @property
    def targets(self) -> Sequence[str]:
        """What of it may be killed."""

    def has_ended(self) -> bool:
        """Whether one of its processes has."""

    def kill(self, target: str) -> None:
        """Kill a target, and wait until that is gone."""

    def wait(self) -> list[int]:
        """Wait until all processes have ended; the exit statuses of those that tell it."""

    def printed(self) -> str:
        """What rank 0 has printed, or all."""


class Ranks:
    """A run whose two ranks are forked, without a launcher."""

    targets = ("rank 0", "rank 1", "all ranks")

    def __init__(self, forks: Forks, arguments: list[str]) -> None:
        self._forks = forks
        self._ranks = forks.start(2, *arguments)

    def has_ended(self) -> bool:
        return any(self._forks.status(rank) is not None for rank in self._ranks)

    def kill(self, target: str) -> None:
        victims = self._ranks if target == "all ranks" else [self._ranks[int(target[-1])]]
        for rank in victims:
            os.kill(rank.pid, signal.SIGKILL)
        self._forks.wait(victims, 10)

    def wait(self) -> list[int]:
        return self._forks.wait(self._ranks, 100)

    def printed(self) -> str:
        return self._ranks[0].log.read_text()


class Launched:
    """A run by a launcher, which alone is killed.

    Attributes:
        command: the launcher.
    """

    targets = ("launcher",)

    def __init__(self, by: Launcher, arguments: list[str], folder: Path, output: Path) -> None:
        self._output = str(output)  # all its processes have it in their command line
        self._log = folder / f"{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self._process = launcher.start(
                2, "--module", MODULE, *arguments, folder=folder, by=by, log=log
            )
        self.command = psutil.Process(self._process.pid)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self, target: str) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float = 100) -> list[int]:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > deadline:
                for process in left:  # they would train on
                    process.kill()
                raise AssertionError(f"{left} have not ended: {self.printed()[-3000:]}")
            time.sleep(0.1)
        return [self._process.wait()]

    def printed(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """The launcher and all that it has started, by their numbers."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if self._output in (process.info["cmdline"] or ())
        ]


class Kills:
    """Kills runs at moments drawn by chance.

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
            kills: at most so many; every fifth is of a launcher.
            saving: kill only while a checkpoint is being written.
        """
        done = 0
        while True:
            before = len(newest_first(output / "checkpoints"))
            launched = done < kills and self.found["kills"] % 5 == 4
            run = self._start(arguments, output, launched=launched)
            killed = done < kills and self._kill(run, output, saving)
            statuses = run.wait()
            printed = run.printed()
            self.found["checkpoints skipped"] += printed.count("alto_ds.checkpoint: skipped")
            if not killed:
                assert ("resuming from" in printed) is (before > 0), printed
                assert set(statuses) == {0}, printed[-3000:]
                assert FINISHED in printed
                return done
            done += 1
            whole = newest_first(output / "checkpoints")
            saved = int(whole[0][-7:]) if whole else 0
            self.found["steps repeated"] += max(0, len(_rows(output)) - saved)

    def _start(self, arguments: list[str], output: Path, *, launched: bool) -> Started:
        if not launched:
            return Ranks(self._forks, arguments)
        by = self._chance.choice([launcher.deepspeed, launcher.torchrun])
        return Launched(by, arguments, output.parent, output)

    def _kill(self, run: Started, output: Path, saving: bool) -> bool:
        """Wait for a moment and kill; False where the run has ended before."""
        target = self._chance.choice(run.targets)
        if saving:
            first = latest_in(output / "checkpoints")
            skip = self._chance.randrange(3)  # checkpoints to let pass
            self._until(run, lambda: _number(output) >= _number_of(first) + skip)
            self._until(run, lambda: _is_saving(output))
            time.sleep(self._chance.random() * 0.01)
        else:
            # Until a run has ended, mostly. That by a launcher takes so much longer to start.
            time.sleep(self._chance.random() * (18 if target == "launcher" else 6))
        if run.has_ended():
            return False
        while_saving = _is_saving(output)
        run.kill(target)
        self.found["kills"] += 1
        self.found[f"of {target}"] += 1
        # A killed rank leaves what it was writing. Ranks whose launcher was killed go on.
        self.found["while saving"] += while_saving if target == "launcher" else _is_saving(output)
        return True

    def _until(self, run: Started, reached: Callable[[], bool]) -> None:
        """Wait until something is so, or one of the processes has ended."""
        deadline = time.monotonic() + 100
        while not reached() and not run.has_ended():
            assert time.monotonic() < deadline, run.printed()[-3000:]


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


SLOW = [pytest.param(30, seed, marks=pytest.mark.slow) for seed in (2, 3)]  # 60 kills in all


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), *SLOW])
def test_a_killed_run_goes_on_bitwise(
    straight: Path, tmp_path: Path, forks: Forks, kills: int, seed: int
) -> None:
    killing = Kills(forks, seed)
    left, runs, began = kills, 0, time.monotonic()
    while left:
        output = f"run{runs}"
        arguments = options(tmp_path, output, save_interval=1, timeout=TIMEOUT)
        left -= killing.run(arguments, tmp_path / output, min(left, 5), saving=runs % 2 == 0)
        assert_equal(tmp_path / output, straight / "straight")
        runs += 1
        shutil.rmtree(tmp_path / output)
    lost = time.monotonic() - began - runs * float((straight / "seconds").read_text())
    print(dict(killing.found), f"runs: {runs}, seconds lost: {lost:.0f}")
    assert killing.found["while saving"] >= kills * 25 / 60
    assert killing.found["checkpoints skipped"] == 0  # what was being written is not seen at all


@pytest.mark.parametrize(
    "functions",
    [
        ["_clone_world_group", "prepare_data"],  # DeepSpeed's, and one of ours
        pytest.param(["one_run"], marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_killed_before_it_joins_a_group_ends_the_others_in_time(
    tmp_path: Path, forks: Forks, functions: list[str]
) -> None:
    """By itself PyTorch would wait for it for 30 minutes."""
    runs = [
        forks.start(
            2,
            function,
            *options(tmp_path, function, timeout=JOINING),
            script="tests/scripts/lose_a_rank_between_groups.py",
        )
        for function in functions
    ]
    for first, lost in runs:
        assert forks.wait([lost], 60) == [-signal.SIGKILL]
        assert "This rank is lost." in lost.log.read_text()
        # 15 seconds more for Python to end on a busy machine.
        assert forks.wait([first], JOINING + 15) == [1]
        assert f"timeout after {JOINING}000ms" in first.log.read_text()


@pytest.mark.slow
def test_a_rank_that_falls_silent_while_saving_ends_the_others_in_time(
    tmp_path: Path, forks: Forks
) -> None:
    first, silent = forks.start(
        2, *options(tmp_path, "output", save_interval=1, max_steps=500, timeout=JOINING)
    )
    deadline = time.monotonic() + 100
    while not _is_saving(tmp_path / "output"):
        assert time.monotonic() < deadline, first.log.read_text()[-3000:]
    os.kill(silent.pid, signal.SIGSTOP)
    assert forks.wait([first], JOINING + 15) == [1]
    assert "saving.py" in first.log.read_text()  # where it waited
    os.kill(silent.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["command", "middle"])
def test_ranks_whose_launcher_is_killed_while_they_are_importing_end(
    tmp_path: Path, whom: str
) -> None:
    """They find none when they look for it, and must not take that for a start without one."""
    arguments = options(tmp_path, "output", max_steps=1000)
    run = Launched(launcher.deepspeed, arguments, tmp_path, tmp_path / "output")
    deadline = time.monotonic() + 100
    # The command, the launcher of the node, and two ranks.
    while len(found := run.processes()) < (2 if whom == "command" else 4):
        assert time.monotonic() < deadline, run.printed()[-3000:]
    middle = [process for process in found if NODE_LAUNCHER in process.info["cmdline"]]
    victim = run.command if whom == "command" else middle[0]
    victim.kill()
    run.wait(300)  # imports take long on a busy machine; ranks that live on would train meanwhile
    assert _rows(tmp_path / "output") == []


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


@pytest.mark.parametrize(
    ("gone", "saving"),
    [
        ("output", True),
        ("output/checkpoints", False),
        pytest.param("output", False, marks=pytest.mark.slow),
        pytest.param("output/checkpoints", True, marks=pytest.mark.slow),
    ],
)
def test_a_folder_that_vanishes_ends_all_ranks_and_is_named(
    tmp_path: Path, forks: Forks, gone: str, saving: bool
) -> None:
    """It is not made again in silence, neither by this run nor by the next start."""
    interval = 1 if saving else 5
    arguments = options(tmp_path, "output", save_interval=interval, max_steps=500)
    output = tmp_path / "output"
    ranks = forks.start(2, *arguments)
    deadline = time.monotonic() + 100
    while _number(output) < interval or _is_saving(output) is not saving:
        assert time.monotonic() < deadline, ranks[0].log.read_text()[-3000:]
    (tmp_path / gone).rename(tmp_path / "moved")  # at once, whatever a rank is writing
    remove = ["rm", "-rf", str(tmp_path / gone)]
    while saving and any(forks.status(rank) is None for rank in ranks):
        # Again and again, for ranks that are writing may make it once more.
        subprocess.run(remove, check=False, capture_output=True)
        assert time.monotonic() < deadline, ranks[0].log.read_text()[-3000:]
    assert forks.wait(ranks, 60) == [ExitStatus.REFUSED] * 2
    printed = ranks[0].log.read_text()
    (said,) = (line for line in printed.splitlines() if line.startswith("alto_ds.pretrain: "))
    # Whoever looks first says it: a rank that goes on training, or one that still saves.
    assert f"{tmp_path / gone} is gone: " in said or f"{output}/checkpoints" in said
    assert "Traceback" not in printed + ranks[1].log.read_text()
    assert not (tmp_path / gone).exists()
    if gone != "output":
        again = forks.run(2, *arguments, status=ExitStatus.REFUSED)
        assert f"{output}/checkpoints is gone, and {output}/run.json says" in again
