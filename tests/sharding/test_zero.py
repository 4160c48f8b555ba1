"""ALTO and E compute the same update however DeepSpeed shards them.

Every case trains through a real DeepSpeed engine on real ranks and is compared with the yardstick,
the same optimizer on whole tensors in one process, given the gradients that DeepSpeed delivered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from tests.sharding.harness import measured
from tests.sharding.zero_cases import (
    CASES,
    STEPS,
    ZeroCase,
    run_exact,
    run_overflow,
    run_refused,
    run_resume,
)


def rows(chosen: Callable[[ZeroCase], bool], worlds: tuple[int, ...] = (1, 2, 3, 4)) -> list[Any]:
    """World sizes and names of the chosen cases."""
    return [
        pytest.param(world_size, name, id=f"{name}-{world_size}ranks")
        for world_size in worlds
        for name, case in CASES.items()
        if chosen(case) and world_size in case.worlds
    ]


def is_exact(case: ZeroCase) -> bool:
    return case.measures is run_exact and not is_naive(case)


def is_alto(case: ZeroCase) -> bool:
    return is_exact(case) and case.optimizer_type == "ALTO"


def is_naive(case: ZeroCase) -> bool:
    return case.optimizer_type == "NaiveALTO"


@pytest.mark.parametrize(("world_size", "name"), rows(is_exact))
def test_masters_and_states_equal_the_unsharded_optimizer(world_size: int, name: str) -> None:
    case = CASES[name]
    for rank in measured(world_size, name):
        assert rank["wrapper"] == case.wrapper
        assert rank["moved"] > 0.1
        assert rank["masters"] < 1e-6
        assert all(error < 1e-6 for error in rank["states"].values())
        # Precondition: DeepSpeed handed each layer its own gradient. Half precision rounds it,
        # by 6 % where samples nearly cancel.
        if case.known_gradients:
            assert rank["gradients"] < (0.2 if case.half else 1e-5)


@pytest.mark.parametrize(("world_size", "name"), rows(is_alto))
def test_trust_ratios_are_those_of_whole_layers_on_every_rank(world_size: int, name: str) -> None:
    ranks = measured(world_size, name)
    for rank in ranks:
        assert rank["ratios"] == ranks[0]["ratios"]
        assert rank["ratios"].keys() == rank["right_ratios"].keys()
        for layer, expected in rank["right_ratios"].items():
            assert rank["ratios"][layer] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("world_size", "name"),
    rows(lambda case: case.measures is run_exact and case.sharded, worlds=(2, 3, 4)),
)
def test_layers_straddle_ranks_and_padding_is_poisoned(world_size: int, name: str) -> None:
    """The precondition of the matrix: otherwise it would prove nothing."""
    ranks = measured(world_size, name)
    straddling = {layer for rank in ranks for layer in rank["straddling"]}
    assert len(straddling) >= 2
    assert any(rank["padding_only"] for rank in ranks)
    assert any(rank["padding"] for rank in ranks)


@pytest.mark.parametrize(("world_size", "name"), rows(is_naive))
def test_the_matrix_catches_a_flat_tensor_taken_for_one_layer(world_size: int, name: str) -> None:
    assert max(rank["masters"] for rank in measured(world_size, name)) > 1e-2


@pytest.mark.parametrize(("world_size", "name"), rows(lambda case: case.measures is run_overflow))
def test_a_step_skipped_by_overflow_changes_nothing(world_size: int, name: str) -> None:
    for rank in measured(world_size, name):
        assert rank["wrapper"] == CASES[name].wrapper
        assert rank["skipped_steps"] == 1
        assert rank["changed_by_skipped"] == 0
        assert rank["changed_by_next"] > 0


@pytest.mark.parametrize(("world_size", "name"), rows(lambda case: case.measures is run_refused))
def test_what_is_not_exact_is_refused_on_all_ranks(world_size: int, name: str) -> None:
    for rank in measured(world_size, name):
        assert rank["message"].startswith(CASES[name].refused)
        assert rank["changed"] == 0


@pytest.mark.parametrize(("world_size", "name"), rows(lambda case: case.measures is run_resume))
def test_a_checkpoint_restores_weights_and_states_to_the_bit(world_size: int, name: str) -> None:
    for rank in measured(world_size, name):
        assert rank["wrapper"] == CASES[name].wrapper
        assert rank["tensors"] > 10
        assert rank["changed_by_resuming"] == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_gradient_accumulation_and_number_of_ranks_do_not_matter(stage: int) -> None:
    """Global batches are equal, and their gradients exact, on 1, 2 and 4 ranks."""
    expected = measured(1, f"zero{stage}-fp32")[0]["weights"]
    for world_size in (1, 2, 4):
        for name in (f"zero{stage}-fp32", f"zero{stage}-fp32-gas4"):
            weights = measured(world_size, name)[0]["weights"]
            for layer, values in expected.items():
                assert weights[layer] == pytest.approx(values, rel=1e-5, abs=1e-7), (name, layer)


@pytest.mark.parametrize(("world_size", "name"), rows(is_alto))
def test_one_all_reduce_of_16_bytes_a_layer_and_16_more_for_each_call_of_step(
    world_size: int, name: str
) -> None:
    """Counted by a stand-in for torch.distributed.all_reduce; none where nothing is sharded."""
    case = CASES[name]
    for rank in measured(world_size, name):
        calls = rank["sent"]
        assert len(calls) >= STEPS
        if world_size == 1 or not case.sharded:
            assert not any(calls)
            continue
        assert all(len(sizes) == 1 for sizes in calls)
        layers = len(rank["right_ratios"])
        assert sum(size for (size,) in calls) == 16 * (layers * STEPS + len(calls))


@pytest.mark.parametrize(
    ("world_size", "name"), rows(lambda case: is_alto(case) and "stage" in case.zero)
)
def test_state_is_12_bytes_per_parameter_and_8_for_lamb_or_bf16(world_size: int, name: str) -> None:
    """Shared equally by the ranks: a rank owns 1/ranks of the parameters, but for padding."""
    ranks = measured(world_size, name)
    expected = CASES[name].state_bytes
    assert [rank["state_bytes"] / rank["owned"] for rank in ranks] == [expected] * world_size
    assert len({rank["owned"] for rank in ranks}) == 1
    assert ranks[0]["owned"] * world_size == pytest.approx(ranks[0]["parameters"], rel=0.05)


def test_a_script_misled_by_the_placeholders_of_zero_init_is_told_so_and_all_is_scaled() -> None:
    """Otherwise it would train without a single trust ratio, and without a word."""
    ranks = measured(2, "misled-by-zero-init")
    assert [len(rank["warnings"]) for rank in ranks] == [1, 0]
    assert "partitioned by deepspeed.zero.Init" in ranks[0]["warnings"][0]
    for rank in ranks:
        assert rank["undecayed"] == 11  # the precondition: all of them, matrices too
        assert len(rank["scaled"]) >= 9
        assert all(rank["scaled"].values())
        assert rank["ratios"]["matrix"] != 1
