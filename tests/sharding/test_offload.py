"""ZeRO-Infinity's NVMe, and states that move away and back, on 4 ranks.

The NVMe tests need libaio (``apt install libaio-dev``), and DeepSpeed compiles an operator for
them, which takes minutes: run them with ``launch/test.sh -m slow``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.launcher import report_of


def measured(name: str) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed")
    kind = "nvme" if name.startswith("nvme") else "memory"
    ranks = report_of("tests.sharding.offload_worker", 4, kind)[name]
    for rank in ranks:
        assert "error" not in rank, rank["error"]
    return ranks


@pytest.fixture
def libaio() -> None:
    op_builder = pytest.importorskip("deepspeed.ops.op_builder")
    if not op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio and a C++ compiler: apt install libaio-dev g++")


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
def test_states_on_nvme_equal_those_in_memory_to_the_bit() -> None:
    for rank in measured("nvme"):
        # Precondition: at the end all three states of both matrices lie on NVMe.
        assert sorted(rank["on_nvme"]) == sorted(2 * ["exp_avg_grad", "exp_avg", "exp_avg_sq"])
        assert rank["changes"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
def test_what_deepspeed_gets_wrong_with_nvme_is_refused_on_all_ranks() -> None:
    for rank in measured("nvme-few-buffers"):
        assert '"buffer_count": 4} is too few; write 5' in rank["message"]
    for rank in measured("nvme-misaligned"):
        assert "loses the gradient of" in rank["message"]
        assert 'write "sub_group_size": 1' in rank["message"]
    for rank in measured("nvme-bf16-states"):
        assert '"state_dtype": "bf16" cannot be used with offload to NVMe' in rank["message"]


def test_all_three_states_move_away_and_back() -> None:
    """By engine.offload_states() and reload_states() between two steps, under ZeRO-2.

    Without an accelerator both are the CPU; what the first calls is shown on the meta device.
    """
    for rank in measured("offload-states"):
        assert rank["changes"] == 0
        assert rank["devices"] == [["meta"] * 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("offload-states-zero3", "Offloading is supported only for DeepSpeed FusedAdam"),
        ("partial-offload", "Hybrid Optimizer Only Supports DeepSpeedCPUAdam"),
    ],
)
def test_deepspeed_itself_refuses_on_all_ranks(name: str, message: str) -> None:
    assert all(message in rank["message"] for rank in measured(name))
