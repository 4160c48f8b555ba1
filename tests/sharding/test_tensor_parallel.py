"""Tensor parallelism 2 × data parallelism 2, by megatron-core or AutoTP, equals one process."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from alto_ds.layout import tensor_parallel
from tests.launcher import report_of


def measured(name: str) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    pytest.importorskip("megatron.core", reason="needs the package megatron-core")
    result = report_of("tests.sharding.tensor_parallel_worker", 4)[name]
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize(
    "name",
    [
        *(f"zero{stage}" for stage in (0, 1, 2, 3)),
        *(f"autotp-zero{stage}" for stage in (0, 1, 2)),
    ],
)
def test_losses_weights_and_ratios_equal_one_process(name: str) -> None:
    result = measured(name)
    assert result["loss"] < 1e-5
    assert result["weights"] < 1e-5
    assert result["ratios"] < 1e-4


def test_autotp_cut_the_model() -> None:
    """The precondition: 8 matrices and 5 column-parallel biases."""
    assert measured("autotp-zero1")["cut"] == 13


def test_the_step_by_which_a_wrapper_has_states_made_does_not_count() -> None:
    """FP16_UnfusedOptimizer takes it when it is made; all ranks must agree that it is none."""
    result = measured("zero0-bf16")
    assert result["steps"] == [10]
    assert result["loss"] < 0.05


def test_a_flat_tensor_taken_for_one_layer_is_caught() -> None:
    assert measured("naive")["weights"] > 0.1


def test_a_marked_parameter_without_a_known_group_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    monkeypatch.setitem(sys.modules, "deepspeed.utils.groups", SimpleNamespace())
    monkeypatch.delitem(sys.modules, "megatron.core.parallel_state", raising=False)
    param = nn.Parameter(torch.ones(2))
    assert tensor_parallel.groups_of(param, "row") == ()
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="parameter row is marked as tensor parallel"):
        tensor_parallel.groups_of(param, "row")
