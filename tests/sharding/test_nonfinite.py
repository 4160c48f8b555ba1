"""NaN and infinity on one rank are told to all that share the layer, and written nowhere."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from tests.sharding.harness import measured
from tests.sharding.nonfinite_cases import CASES, run_damaged, run_skipped

# DeepSpeed makes an optimizer from a JSON without names; the other cases give names.
LAYER_IN_MESSAGES = re.compile(r"param_groups\.0\.0|(embedding|column)\.weight")


def rows(measures: Any) -> list[Any]:
    return [
        pytest.param(case.worlds[0], name, id=name)
        for name, case in CASES.items()
        if case.measures is measures and name not in ("damaged-replica", "damaged-column-of-a-mesh")
    ]


def place(row: dict[str, Any]) -> str:
    """As messages call it."""
    return row["place"] if row["place"] in ("gradient", "weight") else f"state {row['place']}"


@pytest.mark.parametrize(("world_size", "name"), rows(run_damaged))
def test_all_ranks_raise_together_and_nothing_that_is_not_finite_is_written(
    world_size: int, name: str
) -> None:
    case = CASES[name]
    ranks = measured(world_size, name)
    for rank in ranks:
        assert rank["finite"]
        assert len(rank["rows"]) == 3 * len(case.places)
    for told in zip(*(rank["rows"] for rank in ranks), strict=True):
        row, *others = told if "hsdp" not in name else told[2:]  # a replica knows of itself only
        # E has changed nothing, and so has not counted the step.
        step = 2 if name.startswith("damaged-e-") else row["step"]
        assert f"step {step}: " in row["message"]
        assert LAYER_IN_MESSAGES.search(row["message"])
        assert place(row) in row["message"]
        assert f"(rank {row['victim']})" in row["message"]
        for other in others:
            assert other["message"] == row["message"]
        assert all(rank["spread"] == 0 for rank in told)


@pytest.mark.parametrize(("world_size", "name"), rows(run_skipped))
def test_a_skipped_step_changes_nothing_and_the_next_is_exact(world_size: int, name: str) -> None:
    for rank in measured(world_size, name):
        assert rank["message"] == ""
        assert rank["changed"] == 0
        calls = 1 if name == "skipped-fsdp2" else len(CASES[name].layers)  # of optimizer.step()
        assert rank["skipped"] == calls
        assert rank["different"] == 0


def test_ranks_that_share_other_layers_with_the_holders_are_told_who_knows_more() -> None:
    ranks = measured(4, "damaged-column-of-a-mesh")
    for told in zip(*(rank["rows"] for rank in ranks), strict=True):
        victim = told[0]["victim"]
        knows = {rank for rank in range(4) if rank % 2 == victim % 2}  # the victim's column
        for rank, row in enumerate(told):
            if rank in knows:
                assert (
                    f"norm.weight has numbers that are not finite in its {place(row)}"
                    in (row["message"])
                )
            else:
                assert f"rank {victim} has found numbers" in row["message"]
                assert "in layers of which this rank has no part" in row["message"]
            assert row["spread"] == 0


def test_a_replica_that_is_damaged_alone_raises_alone() -> None:
    """Where each rank has all layers nothing is sent; the launcher ends the others."""
    for number, rank in enumerate(measured(2, "damaged-replica")):
        assert rank["finite"]
        for row in rank["rows"]:
            assert bool(row["message"]) == (number == row["victim"])
            assert row["spread"] == 0


def test_replicas_share_a_loss_that_is_infinite_on_one_rank() -> None:
    ranks = measured(2, "overflow-of-a-replica")
    for rank in ranks:
        assert rank["finite"]
        # Its own rank is all that a replica can tell.
        assert rank["message"].replace("(rank 1)", "(rank 0)") == ranks[0]["message"]
        assert "ALTO: step 2: param_groups.0.0 has numbers" in rank["message"]
        assert "in its gradient" in rank["message"]
