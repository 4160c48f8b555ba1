"""A real Slurm of two nodes that are this machine: requeued, preempted, resumed, same numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from tests import launcher
from tests.launcher import ROOT
from tests.pretrain.forked import Forks
from tests.pretrain.runs import measured, options, weights

LONGER = {"max_steps": 500, "eval_interval": 100, "save_interval": 100}
# What a user does, and another whose job comes first.
SCRIPT = """
set -euo pipefail
state() { scontrol --oneliner show job "$1" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }
restarts() { scontrol --oneliner show job "$1" | grep -o 'Restarts=[0-9]*' | cut -d= -f2; }
steps() { cat "$METRICS" 2>/dev/null | wc -l; }
until_true() {
    for _ in $(seq 1200); do
        if eval "$1"; then return; fi
        # Slurm lets a requeued job wait for two minutes.
        scontrol update JobId="$job" StartTime=now 2>/dev/null || true
        sleep 0.1
    done
    echo "never: $1"
    scontrol show job
    exit 1
}
job=$(sbatch --parsable --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 \\
    --output="$LOG" launch/slurm.sbatch "$@")
until_true '[ "$(steps)" -ge 20 ]'
scancel --signal=USR1 "$job"
until_true '[ "$(restarts "$job")" -ge 1 ] && [ "$(state "$job")" = RUNNING ]'
before=$(steps)
until_true '[ "$(steps)" -gt "$before" ]'
other=$(sbatch --parsable --partition=high --nodes=2 --exclusive --output=/dev/null \\
    --wrap='sleep 2')
until_true '[ "$(state "$other")" = COMPLETED ]'
until_true '[ "$(state "$job")" = COMPLETED ]'
echo "restarts: $(restarts "$job")"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))),
    reason="needs root and Debian's slurmctld, slurmd, slurm-client and munge",
)
def test_a_job_that_is_preempted_goes_on_bitwise(
    folder: Path, forks: Forks, tmp_path: Path
) -> None:
    """Requeued by its own script after SIGUSR1, and by Slurm after a preemption."""
    forks.run(2, *options(tmp_path, "straight", **LONGER))
    arguments = options(tmp_path, "job", **LONGER)
    place = arguments.index("--output_dir")
    del arguments[place : place + 2]
    settings = launcher.settings(folder) | {
        "ALTO_DS_INSTALLED": "1",
        "METRICS": str(tmp_path / "job/metrics.jsonl"),
        "LOG": str(tmp_path / "log.txt"),
        "OUTPUT_DIR": str(tmp_path / "job"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    finished = subprocess.run(
        ["tests/slurm.sh", "bash", "-c", SCRIPT, "submit", *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    log = (
        (tmp_path / "log.txt").read_text(errors="replace")
        if (tmp_path / "log.txt").exists()
        else ""
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr + log
    assert "restarts: 2" in finished.stdout, log
    assert log.count("resuming from") >= 2
    assert measured(tmp_path / "job") == measured(tmp_path / "straight")
    found, expected = weights(tmp_path / "job"), weights(tmp_path / "straight")
    assert all((found[name] == expected[name]).all() for name in expected)
