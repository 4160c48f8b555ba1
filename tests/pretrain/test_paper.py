"""launch/paper.sh: the paper's comparison by one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain.metrics import read_metrics
from tests import launcher
from tests.launcher import ROOT
from tests.pretrain.runs import TEXTS

OPTIMIZERS = ("alto", "lamb", "adamw", "adam")
STEPS = 60  # enough to be interrupted
# Stands for python and for a launcher: writes its arguments to $CALLS. The launcher ends with $FAIL
# where one of its arguments has that name.
STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exit; fi
echo "$(basename "$0") OUTPUT_DIR=${OUTPUT_DIR:-} DS_ACCELERATOR=${DS_ACCELERATOR:-} $*" >>"$CALLS"
case "$*" in *"${FAIL:-none}.json"*) exit 75 ;; esac
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A document in each line, as the GPT-2 output dataset has them."""
    path = tmp_path / "webtext.train.jsonl"
    parts = [part for file in TEXTS for part in file.read_text().split("\n\n") if part]
    lines = [json.dumps({"id": n, "text": part}) + "\n" for n, part in enumerate(parts)]
    path.write_text("".join(lines))
    return path


def start(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Start the script as from a shell without a terminal."""
    own = ("OPTIMIZERS", "SEEDS", "STEPS", "LAUNCH", "NODES", "GPUS_PER_NODE", "GPU", "TOKENIZER")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    settings = launcher.settings(folder) | {
        "ALTO_DS_INSTALLED": "1",
        "OUTPUT_DIR": str(folder / "paper"),
    }
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return subprocess.Popen(
        ["launch/paper.sh", *map(str, arguments)],
        cwd=ROOT,
        env=kept | settings | {"PATH": path} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    """What the script has printed until it ended with the status."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output[-8000:]
    return output


def stubbed(folder: Path, text: Path, status: int = 0, **variables: str) -> list[str]:
    """What the script calls, without doing it."""
    calls = folder / "calls"
    for name in ("python", "launch"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    settings = {
        "CALLS": str(calls),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": "python",
        "LAUNCH": f"{folder}/launch --first",
        "OUTPUT_DIR": "runs/there",
    }
    ended(start(folder, text, "--save_interval", "7", **settings | variables), status)
    return calls.read_text().splitlines()


def test_all_is_called_in_order_with_the_same_text_and_the_papers_settings(
    tmp_path: Path, text: Path
) -> None:
    prepare, plan, *trained, report = stubbed(tmp_path, text, NODES="64", SEEDS="1 2", STEPS="20")
    assert f"prepare --dataset {text} --tokenizer gpt2 --output_prefix runs/there/data" in prepare
    assert "alto_ds.plan configs/gpt2-medium/paper_alto.json --model gpt2-medium" in plan
    assert plan.endswith("--gpu h100 --nodes 64 --gpus-per-node 8 --steps 20")
    names = [(seed, name) for seed in (1, 2) for name in OPTIMIZERS]
    folders = [f"runs/there/{name}-seed{seed}" for seed, name in names]
    for (seed, name), folder, call in zip(names, folders, trained, strict=True):
        begin = f"launch OUTPUT_DIR={folder} DS_ACCELERATOR=cpu --first --deepspeed_config"
        assert call == (
            f"{begin} configs/gpt2-medium/paper_{name}.json --model gpt2-medium "
            f"--data runs/there/data/text --seed {seed} --max_steps 20 --save_interval 7 "
            f"--output_dir {folder}"
        )
    assert report.endswith(f"alto_ds.report {' '.join(folders)} --output_dir runs/there/page")


def test_a_launching_host_without_gpu_does_not_send_the_runs_to_the_cpu(
    tmp_path: Path, text: Path
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    *_, run, _ = stubbed(tmp_path, text, DS_ACCELERATOR="", OPTIMIZERS="adam")
    assert "DS_ACCELERATOR= " in run


def test_a_run_that_has_not_finished_ends_the_script(tmp_path: Path, text: Path) -> None:
    calls = stubbed(tmp_path, text, status=75, FAIL="paper_lamb")
    assert [call.split()[0] for call in calls] == ["python", "python", "launch", "launch"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (
            [],
            {},
            "TEXT is missing; name a .jsonl file, the paper's is webtext.train.jsonl",
        ),
        (["no.jsonl"], {}, "TEXT=no.jsonl is no file; the paper's is webtext.train.jsonl"),
        (["README.md"], {}, "TEXT=README.md must end with .jsonl"),
        (["TEXT"], {"NODES": "2"}, "NODES=2 needs LAUNCH; write what starts a run there"),
        (["TEXT"], {"OPTIMIZERS": "alto lion"}, "there is no configs/gpt2-medium/paper_lion.json"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    tmp_path: Path, text: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    words = [str(text) if word == "TEXT" else word for word in arguments]
    output = ended(start(tmp_path, *words, **variables), status=2)
    assert output.startswith("launch/paper.sh: error: ")
    assert output.count("\n") == 1
    assert message in output


def tiny(folder: Path) -> Path:
    """The paper's configurations for two CPU cores: other batches, schedule and precision."""
    configs = folder / "configs"
    configs.mkdir()
    for name in ("alto", "adamw"):
        config = json.loads((ROOT / f"configs/gpt2-medium/paper_{name}.json").read_text())
        del config["bf16"]
        if name == "adamw":
            # DeepSpeed's own would be compiled, which takes longer than both runs.
            config["optimizer"]["params"]["torch_adam"] = True
        config |= {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
        config["scheduler"]["params"] |= {"total_num_steps": STEPS, "warmup_num_steps": 2}
        (configs / f"paper_{name}.json").write_text(json.dumps(config))
    return configs


@pytest.mark.slow
def test_the_whole_comparison_runs_on_two_ranks_and_goes_on_after_ctrl_c(
    tmp_path: Path, text: Path
) -> None:
    """With the tiny model; takes three to five minutes."""
    output = tmp_path / "paper"
    variables = {
        "MODEL": "gpt2-tiny",
        "CONFIGS": str(tiny(tmp_path)),
        "TOKENIZER": "",
        "GPUS_PER_NODE": "2",
        "OPTIMIZERS": "alto adamw",
    }
    options = ("--seq_length", "32", "--eval_interval", "20", "--save_interval", "20")
    process = start(tmp_path, text, *options, **variables)
    interrupted = output / "adamw-seed1234/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (interrupted.exists() and read_metrics(interrupted)):
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    printed = ended(process, 1)
    assert "== Plan of alto, one of 2 runs of this size ==" in printed
    assert "It fits." in printed
    assert "adamw-seed1234 has ended with status 1. The same command goes on" in printed
    assert 0 < len(read_metrics(interrupted)) < STEPS
    prepared = written(output)

    printed = ended(start(tmp_path, text, *options, **variables))
    assert written(output) == prepared
    folders = [output / f"{name}-seed1234" for name in ("alto", "adamw")]
    runs = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    assert all([row["step"] for row in rows] == list(range(1, STEPS + 1)) for rows in runs)
    # The same weights and sequences, until the optimizers part.
    assert len({rows[0]["loss"] for rows in runs}) == 1
    assert len({json.loads((folder / "run.json").read_text())["data"] for folder in folders}) == 1
    assert all(rows[-1]["val_ppl"] < rows[19]["val_ppl"] for rows in runs)
    page = output / "page/index.html"
    assert printed.endswith(f"{page}\n")
    assert all(f"{rows[-1]['val_ppl']:.2f}" in page.read_text() for rows in runs)


def written(output: Path) -> dict[str, int]:
    """When each file of tokens was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "data").glob("*.bin")}
