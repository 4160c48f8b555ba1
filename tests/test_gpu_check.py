"""What is run on a GPU by one command is rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.launcher import ROOT


@pytest.mark.slow
def test_each_step_of_the_check_on_a_gpu_runs_in_small_on_the_cpu(tmp_path: Path) -> None:
    finished = subprocess.run(
        ["launch/gpu_check.sh", "--device", "cpu", "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": "python"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(report["steps"]) == 6
    shown = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {name}" in shown for name in report["steps"])
    (trained,) = report["steps"]["GPT-2 345M"]["rows"]
    assert trained["tokens a second"] > 0
    optimizers = {row["optimizer"] for row in report["steps"]["Step of each optimizer"]["rows"]}
    assert {"ALTO", "ALTO, bf16 states", "timm Lamb"} <= optimizers
