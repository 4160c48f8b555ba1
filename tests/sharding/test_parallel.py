"""Pipelines, mixtures of experts and sequence parallelism on 4 ranks equal whole tensors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launcher import report_of

WRAPPERS = {
    "moe-zero0": "ALTO",
    "moe-zero1": "DeepSpeedZeroOptimizer",
    "moe-zero1-bf16": "BF16_Optimizer",
    "moe-zero2": "DeepSpeedZeroOptimizer",
    "ulysses-zero1": "DeepSpeedZeroOptimizer",
    "ulysses-zero2": "DeepSpeedZeroOptimizer",
    "ulysses-zero3": "DeepSpeedZeroOptimizer_Stage3",
    "pipeline-zero0": "ALTO",
    "pipeline-zero1": "DeepSpeedZeroOptimizer",
    "pipeline-zero1-bf16": "BF16_Optimizer",
}
PIPELINES = [name for name in WRAPPERS if name.startswith("pipeline")]


def measured(name: str) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    ranks = report_of("tests.sharding.parallel_worker", 4)[name]
    for rank in ranks:
        assert "error" not in rank, rank["error"]
    return ranks


@pytest.mark.parametrize("name", WRAPPERS)
def test_masters_states_and_ratios_equal_the_unsharded_optimizer(name: str) -> None:
    for rank in measured(name):
        assert rank["wrapper"] == WRAPPERS[name]
        assert rank["moved"] > 0.1
        assert rank["masters"] < 1e-6
        assert max(rank["exp_avg_grad"], rank["exp_avg"], rank["exp_avg_sq"]) < 1e-6
        assert rank["ratios"] < 1e-6


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "zero0" not in name])
def test_layers_straddle_ranks(name: str) -> None:
    """The precondition; with experts, both they and dense layers do."""
    straddling = {layer for rank in measured(name) for layer in rank["straddling"]}
    assert len(straddling) >= 2
    if name.startswith("moe"):
        assert len({"experts" in layer for layer in straddling}) == 2


@pytest.mark.parametrize("name", PIPELINES)
def test_both_copies_of_a_tied_embedding_stay_equal(name: str) -> None:
    """Trust ratio, norms and weights, on the first and the last stage of both pipelines."""
    ranks = measured(name)
    assert {rank["stage"] for rank in ranks} == {0, 1}
    assert all(rank["tied"] == ranks[0]["tied"] for rank in ranks)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_learns(name: str) -> None:
    losses = measured(name)[0]["losses"]
    assert losses[-1] < losses[0] / 2


def test_all_ranks_of_a_sequence_arrive_at_the_same_weights() -> None:
    """Otherwise gradients were not added over the parts of the sequence."""
    for name in ("ulysses-zero1", "ulysses-zero2", "ulysses-zero3"):
        assert len({rank["moved"] for rank in measured(name)}) == 1
