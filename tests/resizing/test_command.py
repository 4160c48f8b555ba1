"""``python -m alto_ds.checkpoint universal``: whole or not at all; an error is one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from alto_ds.checkpoint.__main__ import main
from alto_ds.checkpoint.manifest import has_all_sizes
from tests.pretrain.forked import Forks
from tests.resizing.cases import PAIRS, SAVED
from tests.resizing.launches import Launches

NAME = next(name for name, pair in PAIRS.items() if str(pair.source) == "zero2-2ranks")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """What two ranks have written, with the truth beside it."""
    launches = Launches(tmp_path_factory.mktemp("saved"), forks, [NAME])
    launches.save()
    return launches.folder / PAIRS[NAME].source_name


def test_the_newest_whole_checkpoint_is_converted_with_all_states(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved / "checkpoints", folder)
    shutil.copytree(folder / f"step{SAVED}", folder / "step9")
    next((folder / "step9").glob("*optim*")).write_bytes(b"torn")
    assert main(["universal", str(folder), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert f"step{SAVED} is converted" in printed.out
    assert "skipped step9" in printed.err
    truth = torch.load(saved / "truth.pt", weights_only=False)["saved"]
    for state, layers in truth.items():
        for name, value in layers.items():
            file = "fp32" if state == "masters" else state
            found = torch.load(tmp_path / f"out/zero/{name}/{file}.pt", weights_only=True)
            assert torch.equal(found["param"], value), (state, name)
    assert has_all_sizes(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]


class Planted:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch planted",)


def plant(folder: Path) -> None:
    torch.save({"optimizer_state_dict": Planted()}, next(folder.glob("*optim*")))
    (folder / "manifest.json").unlink()


def add_a_file(folder: Path) -> None:
    torch.save(Planted(), folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def at_stage_0(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    for path in folder.glob("*optim*"):
        path.unlink()


def lose_a_rank(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    max(folder.glob("*optim*")).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (plant, "would run posix.system"),
        (add_a_file, "would run posix.system"),
        (empty, "is no checkpoint, and there is none in it"),
        (at_stage_0, "was written at ZeRO stage 0"),
        (lose_a_rank, "has 1 files *_optim_states.pt in place of 2"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / f"checkpoints/step{SAVED}", tmp_path / "in")
    damage(tmp_path / "in")
    assert main(["universal", "in", "out"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_is_there_is_not_overwritten(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["universal", str(saved / "checkpoints"), str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
