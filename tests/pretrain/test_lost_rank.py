"""A rank is lost in mid-step: do the others end, by themselves and in time?"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from tests.pretrain.forked import Forks, Rank
from tests.pretrain.runs import options

RANKS = 3
TIMEOUT = 10  # seconds


def wait_until_lost(rank: Rank) -> None:
    deadline = time.monotonic() + 200
    while "This rank is lost." not in rank.log.read_text():
        assert time.monotonic() < deadline, rank.log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_where_a_rank_is_lost_the_others_end_in_time(
    tmp_path: Path, forks: Forks, name: str
) -> None:
    """The others see a killed rank's connections close; of a stopped one they hear nothing.

    The ranks are plain processes, for a launcher ends them where one has failed.
    """
    arguments = options(tmp_path, "output", timeout=TIMEOUT)
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"train_batch_size": 2 * RANKS}))
    first, lost, last = forks.start(RANKS, name, *arguments, script="tests/scripts/lose_a_rank.py")
    wait_until_lost(lost)
    began = time.monotonic()
    # 15 seconds more for Python to end on a busy machine.
    statuses = forks.wait([first, last], TIMEOUT + 15)
    waited = time.monotonic() - began
    assert all(status > 0 for status in statuses)
    assert forks.status(lost) == (None if name == "SIGSTOP" else -signal.SIGKILL)
    for rank in (first, last):
        text = rank.log.read_text()
        assert "in add_over_ranks" in text  # ALTO's all-reduce is where it waited
        if name == "SIGSTOP":
            assert waited > TIMEOUT - 5
            assert f"Timed out waiting {TIMEOUT}000ms" in text
