"""Whatever bytes a checkpoint has, it is resumed exactly or refused by name."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, event, given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

pytest.importorskip("deepspeed")

from alto_ds.checkpoint.deepspeed_files import problem_of_archive, problem_of_pickle
from alto_ds.checkpoint.manifest import FILE
from tests.faults.harness import (
    equal,
    make_engine,
    one_rank,
    save_steps,
    snapshot,
    try_resume,
)
from tests.fuzzing import CHANCES, mutated

FUZZED = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Saved(NamedTuple):
    """Two checkpoints of an engine on one rank.

    Attributes:
        engine: what they are resumed into.
        folder: of both.
        states: weights and states at each, by its name.
    """

    engine: Any
    folder: Path
    states: dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> list[Saved]:
    """Under ZeRO 1 and 3, whose files differ."""
    return [_saved(tmp_path_factory.mktemp("checkpoints"), stage) for stage in (1, 3)]


def _saved(folder: Path, stage: int) -> Saved:
    engine = make_engine(stage)
    found = save_steps(engine, folder, range(1, 3))
    return Saved(engine, folder, dict(zip(("step1", "step2"), found, strict=True)))


@FUZZED
@given(CHANCES)
def test_fuzzed_bytes_of_a_checkpoint_are_resumed_exactly_or_refused(
    saved: list[Saved], tmp_path: Path, chance: Random
) -> None:
    engine, folder, states = chance.choice(saved)
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "step2", work / "step2", copy_function=os.link)
    (work / "latest").write_text("step2")
    if chance.random() < 0.5:
        shutil.copytree(folder / "step1", work / "step1", copy_function=os.link)
    if chance.random() < 0.5:
        (work / "step2" / FILE).unlink()
    files = sorted(path for path in work.rglob("*") if path.is_file() and "step1" not in path.parts)
    path = chance.choice(files)
    content = mutated(path.read_bytes(), chance)
    path.unlink()  # the other name of the file is that of the whole one
    path.write_bytes(content)
    before = snapshot(engine)
    resumed, error, said = try_resume(engine, work)
    event(f"{'none' if resumed is None else resumed.tag} resumed")
    if resumed is None:
        assert "no checkpoint in" in error
        assert "\n" not in error
        assert equal(snapshot(engine), before)
    else:
        assert equal(snapshot(engine), states[resumed.tag]), said
        assert resumed.client_state["step"] == int(resumed.tag[-1])


@FUZZED
@given(CHANCES)
def test_fuzzed_pickles_in_whole_archives_are_looked_at_without_an_error(
    saved: list[Saved], tmp_path: Path, chance: Random
) -> None:
    """As a stranger may have made them: the checksums of the archive are right."""
    path = chance.choice(sorted((chance.choice(saved).folder / "step2").glob("*.pt")))
    wrong = tmp_path / path.name
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(wrong, "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, mutated(content, chance) if is_pickle else content)
    assert problem_of_archive(wrong) is None
    said = problem_of_pickle(wrong)
    assert said is None or said.startswith(f"{path.name} ")
    assert "\n" not in (said or "")
