"""megatron-core's checkpoints carry all states of ALTO, E and LAMB, and the number of steps."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alto_ds import ALTO
from alto_ds.megatron.checkpoints import _take_steps
from tests import launcher
from tests.sharding.harness import TIME_LIMIT, measured
from tests.sharding.megatron_checkpoint_cases import CASES, OTHERS, RESHARDED, move

MOVED = [name for name, case in CASES.items() if case.measures is move]
SLOW = [name for name in MOVED if CASES[name].slow]  # run them with -m slow, in one launch
ROWS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MOVED]
LOADED = ("loaded", "loaded into fresh", "loaded into stepped", "settings")
EQUAL: dict[str, list[str]] = {where: [] for where in LOADED}
TRAINED = ("fresh, relative", "stepped, relative")


def arrivals(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """What each rank saw at each place; place 0 is where the checkpoint was saved."""
    for rank in measured(4, name, *(SLOW if name in SLOW else ())):
        yield from enumerate(rank["moves"])


@pytest.mark.parametrize("name", ROWS)
def test_all_states_and_steps_come_back_to_the_bit(name: str) -> None:
    for _, found in arrivals(name):
        assert {where: found[where] for where in LOADED} == EQUAL


@pytest.mark.parametrize("name", ROWS)
def test_a_run_that_was_loaded_goes_on_as_the_one_that_was_not_interrupted(name: str) -> None:
    for place, found in arrivals(name):
        topology = (CASES[name].topology, *CASES[name].moves)[place]
        assert found["tensor_parallel"] == topology.tensor_model_parallel_size
        assert all(found[optimizer] < 1e-6 for optimizer in TRAINED)
        if place == 0:  # the same ranks: to the bit
            assert found["fresh"] == found["stepped"] == []


MESSAGES = {
    # megatron-core's own: it looks for the states before it loads anything.
    "Adam's into ALTO": "exp_avg_grad from model not in state dict",
    "Adam's into ALTO, lenient": "RuntimeError: alto_ds.megatron: the checkpoint has no alpha: it",
    "Adam's into ALTO, file": "RuntimeError: alto_ds.megatron: the checkpoint has no alpha: it",
    "Adam's into E, lenient": "alto_ds.megatron: the checkpoint lacks the state e_exp_avg_grad",
    "ALTO's into LAMB": "the checkpoint is of alpha=-5.0, and this optimizer has alpha=0.0",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizers_checkpoint_is_refused_on_all_ranks(name: str) -> None:
    messages = [rank["messages"][name] for rank in measured(4, "saved-others")]
    assert all(MESSAGES[name] in message for message in messages), messages


def test_parameters_of_different_steps_are_not_saved_as_if_they_had_taken_the_same() -> None:
    for rank in measured(4, "saved-others"):
        assert "RuntimeError: alto_ds.megatron: parameters have taken 1, 2 steps" in rank["uneven"]


def test_the_format_that_would_mix_up_layers_is_refused_on_all_ranks() -> None:
    """megatron-core's own fault: a tied embedding has a bucket of its own, behind padding."""
    for rank in measured(4, "saved-others"):
        assert "distrib_optim_sharding_type='fully_reshardable' would mix up" in rank["padded"]


@functools.cache
def resharded() -> list[list[dict[str, Any]]]:
    """Run with -m slow. What each rank measured, by case, in the launches of 4, 2 and 4 ranks."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        names = [f"resharded-{name}" for name in RESHARDED]
        for ranks in (4, 2, 4):
            status, printed = launcher.run_cases(
                ranks, "tests.sharding.harness", folder, *names, seconds=TIME_LIMIT
            )
            assert status == 0, printed
            lines = [Path(folder, f"{rank}.jsonl").read_text() for rank in range(ranks)]
            found.append([dict(map(json.loads, report.splitlines())) for report in lines])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RESHARDED)
def test_states_are_the_same_on_4_on_2_and_again_on_4_ranks(name: str) -> None:
    for launch in resharded():
        for rank in launch:
            found = rank[f"resharded-{name}"]
            assert "error" not in found, found
            if "states" in found:  # the first launch, which only saves
                continue
            assert {where: found[where] for where in LOADED} == EQUAL
            if name != "rounded":  # where rounding magnifies the last bits
                assert all(found[optimizer] < 1e-6 for optimizer in TRAINED)


def test_settings_of_the_checkpoint_that_replace_given_ones_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, own = (ALTO([torch.zeros(2)], alpha=alpha, lr=-alpha) for alpha in (-5.0, -1.0))
    for loaded in (own, saved):
        _take_steps(saved, {"state": {}, "param_groups": [loaded.param_groups[0] | {"params": []}]})
    assert capsys.readouterr().err.splitlines() == [
        "alto_ds.megatron: the checkpoint's settings are used: alpha=-1.0 in place of -5.0."
    ]
