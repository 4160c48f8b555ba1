"""ZeRO-Infinity's NVMe, and states that move away and back.

The NVMe tests need libaio (``apt install libaio-dev``), and DeepSpeed compiles an operator for
them, which takes minutes: run them with ``launch/test.sh -m slow``.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

from tests.sharding import harness
from tests.sharding.offload_cases import CASES, STATES, run_refused

SLOW = tuple(name for name, case in CASES.items() if case.slow)
REFUSED = [
    pytest.param(name, marks=[pytest.mark.slow] * case.slow)
    for name, case in CASES.items()
    if case.measures is run_refused
]


def measured(name: str) -> list[dict[str, Any]]:
    """NVMe's cases have a launch of their own, and need libaio."""
    if not CASES[name].slow:
        return harness.measured(2, name)
    op_builder = pytest.importorskip("deepspeed.ops.op_builder")
    if not op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio and a C++ compiler: apt install libaio-dev g++")
    return harness.measured(4, name, *SLOW)


@pytest.mark.slow
def test_states_on_nvme_equal_those_in_memory_to_the_bit() -> None:
    for rank in measured("nvme"):
        # Precondition: at the end all three states of both matrices lie on NVMe.
        assert sorted(rank["on_nvme"]) == sorted(2 * STATES)
        assert rank["changes"] == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_moved_is_refused_on_all_ranks(name: str) -> None:
    """By alto_ds, where DeepSpeed goes wrong, or by DeepSpeed itself."""
    for rank in measured(name):
        assert CASES[name].message in rank["message"]


@pytest.mark.slow
def test_a_lost_gradient_is_refused_with_a_remedy() -> None:
    for rank in measured("nvme-misaligned"):
        assert 'write "sub_group_size": 1' in rank["message"]


def test_all_three_states_move_away_and_back() -> None:
    """By engine.offload_states() and reload_states() between two steps, under ZeRO-2.

    Without an accelerator both are the CPU; what the first calls is shown on the meta device.
    """
    for rank in measured("offload-states"):
        assert rank["changes"] == 0
        assert rank["devices"] == [["meta"] * 3]
