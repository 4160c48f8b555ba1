"""FSDP2 and DTensor's tensor parallelism on 4 ranks, without DeepSpeed, equal whole tensors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launcher import report_of

ALTO_CASES = (
    "fsdp2",
    "fsdp2-bf16",
    "fsdp2-offload",
    "fsdp2-after-optimizer",
    "hsdp",
    "tp",
    "fsdp2-tp",
)
UNEVEN = ("fsdp2", "fsdp2-fp64", "hsdp", "fsdp2-tp", "naive")


def measured(name: str) -> Any:
    result = report_of("tests.sharding.fully_shard_worker", 4)[name]
    if isinstance(result, dict):
        assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize("name", [*ALTO_CASES, "e-fsdp2", "e-tp"])
def test_parameters_and_states_equal_the_unsharded_optimizer(name: str) -> None:
    result = measured(name)
    assert result["gradients"] < (0.2 if "bf16" in name else 1e-5)  # the model's own, not another's
    assert result["parameters"] < 1e-6
    assert result["states"] < 1e-6


def test_fp64_equals_the_unsharded_optimizer_to_1e_12() -> None:
    result = measured("fsdp2-fp64")
    assert max(result["parameters"], result["states"]) < 1e-12


@pytest.mark.parametrize("name", ALTO_CASES)
def test_trust_ratios_are_those_of_whole_layers(name: str) -> None:
    assert measured(name)["ratios"] < 1e-6


@pytest.mark.parametrize("name", UNEVEN)
def test_ranks_hold_unequal_parts_down_to_nothing(name: str) -> None:
    """The precondition: all layers straddle ranks, and some ranks have nothing of a layer."""
    sizes = measured(name)["local_sizes"]
    assert any(0 in rank for rank in sizes)
    assert sum(len(set(layer)) > 1 for layer in zip(*sizes, strict=True)) >= 2


def test_a_local_part_taken_for_a_layer_is_caught() -> None:
    assert measured("naive")["parameters"] > 1e-2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp2", [16 * 11]),  # 11 parameters
        ("hsdp", [16 * 11]),
        ("tp", [16 * 4]),  # the parameters that are cut
        ("fsdp2-tp", [16 * 11, 16 * 4]),
        ("e-fsdp2", []),
    ],
)
def test_one_all_reduce_for_each_dimension_of_the_mesh_that_cuts(
    name: str, expected: list[int]
) -> None:
    """Bytes of each call of torch.distributed.all_reduce in one step()."""
    assert measured(name)["sent"] == expected


def test_a_distributed_checkpoint_loads_into_another_mesh() -> None:
    """Saved by torch.distributed.checkpoint on 4 ranks, loaded on 2 × 2."""
    result = measured("checkpoint")
    assert result["steps"] == [6]
    assert result["parameters"] < 1e-6
    assert result["states"] < 1e-5


def test_deepspeed_is_not_needed() -> None:
    assert measured("imported_deepspeed") is False
