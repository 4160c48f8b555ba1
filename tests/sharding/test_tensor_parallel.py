"""Tensor parallelism 2 × data parallelism 2, by megatron-core or AutoTP, equals one process."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("deepspeed")

from alto_ds.layout import tensor_parallel
from tests.sharding.harness import measured
from tests.sharding.tensor_parallel_cases import CASES, STEPS


@pytest.mark.parametrize(
    "name",
    [name for name, case in CASES.items() if case.optimizer_type == "ALTO" and not case.bf16],
)
def test_losses_weights_and_ratios_equal_one_process(name: str) -> None:
    for rank in measured(4, name):
        assert rank["loss"] < 1e-5
        assert rank["weights"] < 1e-5
        assert rank["ratios"] < 1e-4


def test_autotp_cut_the_model() -> None:
    """The precondition: 8 matrices and 5 column-parallel biases."""
    assert all(rank["cut"] == 13 for rank in measured(4, "autotp-zero1"))


def test_the_step_by_which_a_wrapper_has_states_made_does_not_count() -> None:
    """FP16_UnfusedOptimizer takes it when it is made; all ranks must agree that it is none."""
    for rank in measured(4, "megatron-zero0-bf16"):
        assert rank["steps"] == [STEPS]
        assert rank["loss"] < 0.05


def test_a_flat_tensor_taken_for_one_layer_is_caught() -> None:
    assert all(rank["weights"] > 0.1 for rank in measured(4, "megatron-naive"))


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
