"""Bad environment variables: one clear line that names the variable, and exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

pytest.importorskip("deepspeed")

import datasets
import torch
from deepspeed.accelerator import real_accelerator

from alto_ds.pretrain import environment
from alto_ds.pretrain.__main__ import main
from alto_ds.pretrain.data.text import documents
from alto_ds.pretrain.settings import DataSettings
from tests.launcher import ROOT
from tests.pretrain.forked import Forks
from tests.pretrain.runs import options

GOOD = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in GOOD.items() if key != name}


WRONG: list[tuple[dict[str, str], str]] = [
    (GOOD | {"RANK": "one"}, "RANK='one' must be a whole number, at least 0"),
    (GOOD | {"RANK": "-1"}, "RANK='-1' must be a whole number, at least 0"),
    (GOOD | {"RANK": ""}, "RANK='' must be a whole number"),
    (GOOD | {"RANK": "0.0"}, "RANK='0.0' must be a whole number"),
    (GOOD | {"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2; number the processes from 0 on"),
    (GOOD | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be a whole number, at least 1"),
    (GOOD | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be a whole number, at least 1"),
    (GOOD | {"WORLD_SIZE": "9" * 30}, "must be a whole number, at least 1"),
    (GOOD | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x' must be a whole number, at least 0"),
    (GOOD | {"LOCAL_RANK": "None"}, "LOCAL_RANK='None' must be a whole number"),
    (GOOD | {"MASTER_PORT": "http"}, "MASTER_PORT='http' must be a whole number, from 1 to 65535"),
    (GOOD | {"MASTER_PORT": "99999"}, "MASTER_PORT='99999' must be a whole number, from 1 to 655"),
    (GOOD | {"MASTER_PORT": "0"}, "MASTER_PORT='0' must be a whole number, from 1 to 65535"),
    (GOOD | {"MASTER_PORT": "tcp://10.0.0.1:29500"}, "a free port of rank 0's node"),
    (without("WORLD_SIZE"), "RANK is set and WORLD_SIZE not: start the run by deepspeed"),
    (without("LOCAL_RANK"), "RANK is set and LOCAL_RANK not"),
    (without("MASTER_ADDR"), "RANK is set and MASTER_ADDR not"),
    (without("MASTER_PORT"), "RANK is set and MASTER_PORT not"),
    ({"RANK": "0"}, "RANK is set and LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
    ({"LOCAL_RANK": "first"}, "LOCAL_RANK='first' must be a whole number"),
    ({"DEEPSPEED_TIMEOUT": "30s"}, "DEEPSPEED_TIMEOUT='30s' must be a whole number, from 1"),
    ({"DEEPSPEED_TIMEOUT": "0"}, "the minutes that ranks wait for each other; correct it or unset"),
    ({"DEEPSPEED_TIMEOUT": "-5"}, "DEEPSPEED_TIMEOUT='-5' must be a whole number"),
    ({"DEEPSPEED_TIMEOUT": "1.5"}, "DEEPSPEED_TIMEOUT='1.5' must be a whole number"),
    ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS='all' must be a number of threads, at least 1"),
    ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS='0' must be a number of threads"),
    ({"OMP_NUM_THREADS": "4,"}, "OMP_NUM_THREADS='4,' must be a number of threads"),
    ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x' must be a whole number"),
    ({"PMI_SIZE": "0"}, "PMI_SIZE='0' must be a whole number"),
    ({"SLURM_STEP_NUM_TASKS": "2(x3)"}, "SLURM_STEP_NUM_TASKS='2(x3)' must be a whole number"),
    ({"SLURM_PROCID": "a"}, "SLURM_PROCID='a' must be a whole number"),
]


@pytest.mark.parametrize(("variables", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_variable_ends_the_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    message: str,
) -> None:
    for name in environment.NUMBERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = environment.problem(os.environ) or ""
    assert message in said
    assert "\n" not in said
    printed = capsys.readouterr().err
    first = environment.is_first_of_node(os.environ)
    assert printed == (f"alto_ds.pretrain: error: {said}.\n" if first else "")


@pytest.mark.parametrize("variables", [{}, GOOD, {"OMP_NUM_THREADS": "4,2"}, {"WORLD_SIZE": "8"}])
def test_right_variables_are_taken(variables: dict[str, str]) -> None:
    assert environment.problem(variables) is None


def test_a_variable_is_looked_at_before_deepspeed_reads_it_at_its_import() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "alto_ds.pretrain", "--help"],
        env=os.environ | {"DEEPSPEED_TIMEOUT": "abc"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("alto_ds.pretrain: error: the environment variable DEEPSPEED_T")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gpu", "DS_ACCELERATOR: DS_ACCELERATOR must be one of ['cuda', 'cpu', "),
        ("", "DS_ACCELERATOR: DS_ACCELERATOR must be one of ['cuda', 'cpu', "),
        ("sdaa", "DS_ACCELERATOR: SDAA_Accelerator requires torch_sdaa"),
        ("npu", "DS_ACCELERATOR: NPU_Accelerator requires torch_npu"),
        pytest.param(
            "cuda",
            "DS_ACCELERATOR='cuda' is not available here; write cpu, or unset it for what this",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is there"),
        ),
    ],
)
def test_an_accelerator_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setattr(real_accelerator, "ds_accelerator", None)  # as in a new process
    monkeypatch.setenv("DS_ACCELERATOR", value)
    said = environment.problem_of_accelerator(os.environ)
    assert said is not None
    assert message in said
    assert "\n" not in said


def test_all_ranks_end_and_the_first_of_the_node_speaks(tmp_path: Path, forks: Forks) -> None:
    variables = GOOD | {"MASTER_PORT": "http"}
    ranks = [
        forks.start_one(
            variables | {"RANK": rank, "LOCAL_RANK": rank}, *options(tmp_path, "output")
        )
        for rank in "01"
    ]
    assert forks.wait(ranks, 60) == [2, 2]
    first, second = (rank.log.read_text() for rank in ranks)
    assert first.startswith("alto_ds.pretrain: error: the environment variable MASTER_PORT='http'")
    assert first.count("\n") == 1
    assert second == ""


@pytest.mark.parametrize("cache", ["a_file", "a_file/below", "/proc/none"])
def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (tmp_path / "a_file").touch()
    text = tmp_path / "text.txt"
    text.write_text("some text")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / cache)
    with pytest.raises(ValueError, match=r"cannot be written to .*; set HF_HOME or HF_D"):
        documents(DataSettings(text=[text]))


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from([*environment.NUMBERS, "OMP_NUM_THREADS", "MASTER_ADDR"]),
        st.text(max_size=6) | st.integers(-2, 70_000).map(str) | st.just("9" * 5000),
        max_size=6,
    )
)
def test_fuzzed_variables_are_taken_or_refused(variables: dict[str, str]) -> None:
    said = environment.problem(variables)
    assert said is None or said.startswith("the environment variable ")
    if said is None and "RANK" in variables:
        assert int(variables["RANK"]) < int(variables["WORLD_SIZE"])
