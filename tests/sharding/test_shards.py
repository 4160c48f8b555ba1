"""Ranks without a tensor, or without a part of some layers, compute the same on 4 ranks."""

from __future__ import annotations

import pytest

from tests.sharding.harness import NaiveALTO, measured
from tests.sharding.linear_model import LinearModel
from tests.sharding.shard_cases import CASES, ENDS, STEPS

EXACT = [name for name, case in CASES.items() if case.make is not NaiveALTO]


@pytest.mark.parametrize("name", EXACT)
def test_masters_states_and_ratios_equal_the_unsharded_optimizer(name: str) -> None:
    for rank in measured(4, name):
        assert rank["moved"] > 0.1
        assert rank["masters"] < 1e-6
        assert all(error < 1e-6 for error in rank["states"].values())
        assert rank["ratios"] < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_nothing_and_layers_are_absent_on_some_ranks(name: str) -> None:
    """The precondition."""
    held = [rank["held"] for rank in measured(4, name)]
    assert held[3] == {}
    ranks_of = {layer: sum(layer in rank for rank in held) for layer in ENDS}
    assert sum(1 < ranks < 4 for ranks in ranks_of.values()) >= 2
    assert sum(ranks == 1 for ranks in ranks_of.values()) >= 2
    groups = [{LinearModel.group_of(layer) for layer in rank} for rank in held]
    assert {0, 2} in groups  # a rank has nothing of a whole group
    assert {0, 1} in groups


@pytest.mark.parametrize("name", EXACT)
def test_all_ranks_join_one_all_reduce_of_16_bytes_a_layer_and_16_more(name: str) -> None:
    """Also the rank without a tensor: it would leave the others waiting, which fails after 30 s."""
    for rank in measured(4, name):
        assert rank["sent"] == [[16 * (len(ENDS) + 1)]] * STEPS


def test_a_shard_taken_for_a_layer_is_caught() -> None:
    assert max(rank["masters"] for rank in measured(4, "shards-naive")) > 1e-2
