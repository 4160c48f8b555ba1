"""The main job on two hosts, which are network namespaces of this machine, by each launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain.ranks import SetupError, init_distributed
from tests import launcher
from tests.pretrain.forked import Forks
from tests.pretrain.runs import MODULE, measured, options

STEPS = 2
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def missing() -> str | None:
    """What keeps this machine from being two hosts, None if nothing."""
    for program in ("ip", "unshare"):
        if not shutil.which(program):
            return f"there is no program {program}"
    cable = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
    probe = ["unshare", "--net", "--uts", "--mount", *cable]
    refusal = subprocess.run(probe, capture_output=True, text=True, check=False).stderr
    return f"network namespaces are not permitted here: {refusal}" if refusal else None


@pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
@pytest.mark.parametrize(
    "starter",
    [
        *("pdsh", "deepspeed", "mpirun"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("torchrun", "srun")),
    ],
)
def test_two_hosts_train_as_one_does(folder: Path, straight: str, starter: str) -> None:
    """With dropout; from the installed package, in a folder that is no checkout."""
    if starter in ("pdsh", "mpirun") and not shutil.which(starter, path=PATH):
        pytest.skip(f"there is no program {starter}")
    if starter == "mpirun":
        pytest.importorskip("mpi4py")
    settings = launcher.settings(folder)
    del settings["PYTHONPATH"]
    exports = folder / "deepspeed_env"  # pdsh passes these on, and nothing else
    exports.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    script = launcher.ROOT / "tests/two_hosts.sh"
    with subprocess.Popen(
        [script, starter, MODULE, *options(folder, starter, max_steps=STEPS)],
        env=os.environ | settings | {"PATH": PATH, "DS_ENV_FILE": str(exports)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=200)
        finally:
            process.terminate()  # not killed: the script removes the namespaces
    assert process.returncode == 0, output[-8000:]
    assert json.loads((folder / starter / "run.json").read_text())["ranks"] == 2
    found = measured(folder / starter)
    assert len(found) == STEPS
    assert "val_loss" in found[-1]
    assert found == measured(folder / "straight")[:STEPS]


def test_srun_without_the_address_of_rank_0_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SetupError, match=r"write: export MASTER_ADDR=\$\(scontrol"):
        init_distributed(timedelta(seconds=10))


def test_ranks_that_mpi4py_does_not_know_are_refused(folder: Path, forks: Forks) -> None:
    """As another MPI's mpirun leaves them: each of them alone, in the same output folder."""
    pytest.importorskip("mpi4py")
    rank = forks.start_one({"OMPI_COMM_WORLD_SIZE": "2"}, *options(folder, "alone"))
    assert forks.wait([rank], 200) == [2]
    printed = rank.log.read_text()
    assert "alto_ds.pretrain: mpirun has started 2 processes, and mpi4py finds 1" in printed
