"""Pipelines, mixtures of experts and sequence parallelism on 4 ranks equal whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from tests.sharding.harness import measured
from tests.sharding.parallel_cases import (
    CASES,
    run_moe,
    run_pipeline,
    run_ulysses,
)


def measured_by(run: Callable[..., Any]) -> list[str]:
    return [name for name, case in CASES.items() if case.measures is run]


@pytest.mark.parametrize("name", CASES)
def test_masters_states_and_ratios_equal_the_unsharded_optimizer(name: str) -> None:
    for rank in measured(4, name):
        assert rank["wrapper"] == CASES[name].wrapper
        assert rank["moved"] > 0.1
        assert rank["masters"] < 1e-6
        assert all(error < 1e-6 for error in rank["states"].values())
        assert rank["ratios"] < 1e-6


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stage])
def test_layers_straddle_ranks(name: str) -> None:
    """The precondition; with experts, both they and dense layers do."""
    straddling = {layer for rank in measured(4, name) for layer in rank["straddling"]}
    assert len(straddling) >= 2
    if CASES[name].measures is run_moe:
        assert len({"experts" in layer for layer in straddling}) == 2


@pytest.mark.parametrize("name", measured_by(run_pipeline))
def test_both_copies_of_a_tied_embedding_stay_equal(name: str) -> None:
    """Trust ratio, norms and weights, on the first and the last stage of both pipelines."""
    ranks = measured(4, name)
    assert {rank["stage"] for rank in ranks} == {0, 1}
    assert all(rank["tied"] == ranks[0]["tied"] for rank in ranks)


@pytest.mark.parametrize("name", measured_by(run_pipeline))
def test_a_pipeline_learns(name: str) -> None:
    losses = measured(4, name)[0]["losses"]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", measured_by(run_ulysses))
def test_all_ranks_of_a_sequence_arrive_at_the_same_weights(name: str) -> None:
    """Otherwise gradients were not added over the parts of the sequence."""
    assert len({rank["moved"] for rank in measured(4, name)}) == 1
