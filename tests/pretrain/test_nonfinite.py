"""NaN in loss, weights or gradients: does the main job end before it saves them?"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.identity import check_identity, write_identity
from alto_ds.pretrain.metrics import read_metrics
from tests.pretrain.forked import Forks
from tests.pretrain.runs import options

SPOIL = "tests/scripts/spoil.py"
SAVES = {"save_interval": 3, "eval_interval": 100, "validation_sequences": 2}


def spoiled(
    folder: Path, forks: Forks, what: str, step: int, stage: int, **more: Any
) -> tuple[str, list[str], int]:
    """Run on 2 ranks until all end as they must.

    Returns:
        What rank 0 printed, the names of the checkpoints, and the number of steps in the metrics.
    """
    arguments = options(folder, "output", **SAVES | more)
    path = folder / "zero2.json"
    config = json.loads(path.read_text()) | {"zero_optimization": {"stage": stage}}
    path.write_text(json.dumps(config))
    ranks = forks.start(2, what, str(step), *arguments, script=SPOIL)
    found = forks.wait(ranks, 200)
    printed = ranks[0].log.read_text()
    assert found == [ExitStatus.NOT_FINITE] * 2, printed[-4000:]
    assert "not finite" not in ranks[1].log.read_text()  # once, by rank 0
    assert "Traceback" not in printed
    saved = folder / "output/checkpoints"
    assert not (folder / "output/model").exists()
    names = sorted(path.name for path in saved.glob("*step*"))
    assert names[-1] == (saved / "latest").read_text()
    steps = len(read_metrics(folder / "output/metrics.jsonl"))
    mark = json.loads((folder / "output/diverged.json").read_text())
    assert mark["step"] == steps + 1
    assert mark["why"] in printed
    versions = json.loads((folder / "output/versions.json").read_text())
    assert versions["torch"] == metadata.version("torch")
    return printed, names, steps


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tmp_path: Path, forks: Forks) -> None:
    printed, saved, steps = spoiled(tmp_path, forks, "weight", 4, stage=0)
    assert "alto_ds.pretrain: ALTO: step 5: transformer.wte.weight has numbers that" in printed
    assert "This step was not saved; " in printed
    assert f"the last good checkpoint is step 3, in {tmp_path}/output/checkpoints." in printed
    assert saved == ["step0000003"]
    assert steps == 4


def test_a_state_that_is_not_finite_on_one_rank_ends_all(tmp_path: Path, forks: Forks) -> None:
    """At ZeRO 0 the optimizers of the ranks send nothing, so only that rank's finds it."""
    printed, saved, steps = spoiled(tmp_path, forks, "state", 4, stage=0, timeout=20)
    assert "alto_ds.pretrain: ALTO: step 5: transformer.wte.weight has numbers that" in printed
    assert "in its state exp_avg (rank 1)" in printed
    assert "the last good checkpoint is step 3, in" in printed
    assert saved == ["step0000003"]
    assert steps == 4


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        pytest.param(0, "1", marks=pytest.mark.slow),
        pytest.param(2, "0, 1", marks=pytest.mark.slow),
        (3, "1"),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, forks: Forks, stage: int, ranks: str
) -> None:
    """The loss of the step is finite still: it is of the weights before."""
    printed, saved, steps = spoiled(tmp_path, forks, "weight", 6, stage)
    assert "step 6: the weights are not finite, first in transformer." in printed
    assert f"(rank {ranks})" in printed
    assert "the last good checkpoint is step 3, in" in printed
    assert saved == ["step0000003"]
    assert steps == 5


def test_a_run_may_go_on_with_another_nonfinite_as_its_error_advises(tmp_path: Path) -> None:
    params = {"lr": 0.1, "nonfinite": "raise"}
    write_identity(tmp_path, {"optimizer": {"type": "ALTO", "params": params}})
    check_identity(tmp_path, {"optimizer": {"type": "ALTO", "params": {"lr": 0.1}}})
    params["nonfinite"] = "skip"
    check_identity(tmp_path, {"optimizer": {"type": "ALTO", "params": params}})
    params["lr"] = 0.2
    with pytest.raises(ValueError, match=r"with optimizer\.params\.lr=0\.1, now 0\.2\. Use"):
        check_identity(tmp_path, {"optimizer": {"type": "ALTO", "params": params}})


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, forks: Forks) -> None:
    printed, saved, steps = spoiled(tmp_path, forks, "gradients", 5, stage=2, max_skipped_steps=4)
    assert "step 8: the last 4 steps were skipped for gradients that are not finite" in printed
    assert saved == ["step0000003", "step0000006"]  # skipped steps leave the weights as they were
    assert "the last good checkpoint is step 6, in" in printed
    assert steps == 7
