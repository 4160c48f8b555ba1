"""A checkpoint goes on, exactly, on another number of ranks and at another stage of ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

from tests.pretrain.forked import Forks
from tests.resizing.cases import PAIRS
from tests.resizing.launches import Launches

DEFAULT = [name for name, pair in PAIRS.items() if pair.default]
SLOW = [name for name in PAIRS if name not in DEFAULT]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Launches:
    return Launches(tmp_path_factory.mktemp("some"), forks, DEFAULT)


@pytest.fixture(scope="module")
def all_others(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Launches:
    return Launches(tmp_path_factory.mktemp("others"), forks, SLOW)


def check(name: str, ranks: list[dict[str, Any]]) -> None:
    """Exact at load, and within 1e-6 of the run that was not converted after 10 more steps."""
    for rank in ranks:
        assert "error" not in rank, rank["error"]
        found, saved = rank["keys"]
        assert found == saved
        assert len(saved) >= 3
        assert not rank["inexact"]
        assert not rank["rest"]
        assert not rank.get("model")
        assert rank["client_step"] == 3
        assert rank["moved"] > 0.05
        assert max(rank["deviation"].values()) < 1e-6, name


@pytest.mark.parametrize("name", DEFAULT)
def test_a_converted_checkpoint_is_exact_and_goes_on_as_the_other(
    name: str, some: Launches
) -> None:
    check(name, some.loaded[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_so_it_does_for_all_other_pairs(name: str, all_others: Launches) -> None:
    check(name, all_others.loaded[name])


@pytest.mark.slow
def test_the_table_beside_deepspeeds_own_converter_and_loader(forks: Forks, tmp_path: Path) -> None:
    """Printed with ``-s``. A pair that DeepSpeed alone gets right needs no conversion by us."""
    launches = Launches(tmp_path, forks, PAIRS)
    right = 0
    for name, ranks in launches.loaded_by_deepspeed.items():
        errors = [rank["error"] for rank in ranks if "error" in rank]
        own = [error for error in errors if "gloo" not in error]  # of a rank that lost no other
        lost = sorted({key for rank in ranks for key in rank.get("lost", ())})
        wrong = sorted({key for rank in ranks for key in rank.get("wrong", ())})
        deviation = max(launches.loaded[name][0]["deviation"].values())
        told = (own or errors)[0].splitlines()[0][:90] if errors else f"lost {lost}, wrong {wrong}"
        right += not (errors or lost or wrong)
        print(f"\n{name}: ours 0 at load, {deviation:.0e} later; DeepSpeed's: {told}", end="")
    assert right < len(PAIRS)
