"""Check and measure on one GPU all that a CPU cannot show, within nine minutes.

    launch/gpu_check.sh                                   # on a GPU, needs no network
    python -m tests.benchmarks.gpu_check --device cpu     # the same steps in small, as a rehearsal

Each step is a process of its own with a limit of time, so that one which fails or hangs leaves the
others alone. After each step the report, ``gpu_check.json`` and ``gpu_check.md``, is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alto_ds.pretrain.settings import SIZES
from tests.benchmarks.__main__ import machine, table
from tests.launcher import ROOT, torchrun

BUDGET = 530  # seconds for all steps
STEPS_345M = 20
WARM_UP = 5  # steps that do not count

# Floating-point operations a second, of matrices in bfloat16 without sparsity, by the makers.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class Step(NamedTuple):
    """One process.

    Attributes:
        name: in the report.
        command: what is run, in the repository's folder.
        seconds: its limit.
        rows: reads from its files what is to be shown as a table.
        variables: of its environment.
    """

    name: str
    command: list[str]
    seconds: float
    rows: Callable[[], list[dict[str, Any]]] = list
    variables: dict[str, str] = {}  # noqa: RUF012  read only


def steps(device: str, folder: Path) -> list[Step]:
    """What is run on ``device``, "cuda" or "cpu", with files in ``folder``."""
    small = device == "cpu"
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    sharding = {"SHARDING_DEVICE": device}
    of_345m = pretrain_345m(folder, small)
    optimizers = [*python, "tests.benchmarks.steps", str(folder / "steps.json")]
    optimizers += ["--device", device, "--model", "gpt2-tiny" if small else "gpt2-medium"]
    return [
        Step(
            "Triton kernel against the reference",
            [*pytest, "tests/test_kernels.py", "-k", "triton and not compiles"],
            100,
        ),
        Step(
            "Sharding matrix, one rank" + ("" if small else ", NCCL"),
            [*pytest, "tests/sharding/test_zero.py", "-k", "1ranks"],
            100,
            variables=sharding,
        ),
        Step(
            "No wait for the device in a warm step",
            [*python, "tests.benchmarks.device_waits", str(folder / "waits.json"), device],
            60,
            lambda: json.loads((folder / "waits.json").read_text()),
        ),
        Step(
            "Step of each optimizer",
            [*optimizers, "--repeats", "1" if small else "15"],
            150,
            lambda: with_bandwidth(json.loads((folder / "steps.json").read_text())),
        ),
        Step(
            "GPT-2 345M",
            of_345m,
            150,
            lambda: throughput(folder / "345m", "gpt2-tiny" if small else "gpt2-medium"),
        ),
        Step(
            "launch/demo.sh",
            ["launch/demo.sh", "--output_dir", str(folder / "demo")]
            + (["--max_steps", "3"] if small else []),
            180,
            lambda: last_row(folder / "demo"),
            {"ALTO_DS_INSTALLED": "1"},
        ),
    ]


def pretrain_345m(folder: Path, small: bool) -> list[str]:
    """The main job's command: 20 steps of a global batch that takes a second on one GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "configs/gpt2-medium/paper_alto.json").read_text())
    config["train_micro_batch_size_per_gpu"] = 2 if small else 16
    config["train_batch_size"] = 4 if small else 64
    config["scheduler"]["params"] |= {"total_num_steps": 100, "warmup_num_steps": 10}
    file = folder / "345m.json"
    file.write_text(json.dumps(config))
    command = [*torchrun(1), "-m", "alto_ds.pretrain", "--deepspeed_config", str(file)]
    command += ["--model", "gpt2-tiny" if small else "gpt2-medium", "--vocab_size", "4096"]
    # Evaluations and checkpoints once, at the end.
    command += ["--max_steps", str(STEPS_345M), "--eval_interval", "1000"]
    command += ["--save_interval", "1000", "--validation_sequences", "8"]
    return [*command, "--tokenizer_documents", "200", "--output_dir", str(folder / "345m")]


def with_bandwidth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of steps.py, with the share of a copy's bandwidth that each optimizer reaches."""
    for row in rows:
        if "of its bytes, copy" in row:
            row["% of copy bandwidth"] = 100 / row["of its bytes, copy"]
    return rows


def throughput(folder: Path, model: str) -> list[dict[str, Any]]:
    """Tokens a second and the use that is made of the GPU, of steps that are warm."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == STEPS_345M, f"{len(logged)} steps"
    speeds = sorted(row["tokens_per_second"] for row in logged[WARM_UP:])
    speed = speeds[len(speeds) // 2]
    config = json.loads((folder / "model/config.json").read_text())
    peak = next((PEAKS[name] for name in PEAKS if name in gpu_name()), None)
    used = speed * flops_of_token(config["vocab_size"], **SIZES[model])
    return [
        {
            "model": model,
            "tokens a second": speed,
            "TFLOP/s": used / 1e12,
            "MFU, %": 100 * used / peak if peak else "no peak known for this device",
            "loss, first and last step": f"{logged[0]['loss']:.3f}, {logged[-1]['loss']:.3f}",
        }
    ]


def flops_of_token(
    vocabulary: int, n_layer: int, n_embd: int, n_head: int, n_positions: int
) -> int:
    """Forward and backward: 6 for each weight of a matrix, and attention over all positions.

    As in the appendix of PaLM (arXiv 2204.02311): nothing for recomputation.
    """
    del n_head
    weights = 12 * n_layer * n_embd**2 + vocabulary * n_embd
    return 6 * weights + 12 * n_layer * n_embd * n_positions


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def last_row(folder: Path) -> list[dict[str, Any]]:
    """The last line of a run's metrics."""
    return [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])]


def run(step: Step, seconds: float, variables: dict[str, str]) -> dict[str, Any]:
    """Run a step for at most so many seconds; what it did, and the end of what it printed."""
    began = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | variables | step.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
        result = "ok" if process.returncode == 0 else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its ranks, too
        printed, _ = process.communicate()
        result = f"not done after {seconds:.0f} s"
    rows: list[dict[str, Any]] = []
    if result == "ok":
        try:
            rows = step.rows()
        except Exception as error:  # the report says it, and the other steps are run
            result = f"no figures: {error!r}"
    return {
        "result": result,
        "seconds": time.monotonic() - began,
        "rows": rows,
        "printed": printed[-4000:],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# Check on a GPU", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in report["machine"].items()]
    for name, found in report["steps"].items():
        lines += ["", f"## {name}", "", f"{found['result']}, {found['seconds']:.0f} s"]
        if found["rows"]:
            lines += ["", table(found["rows"])]
        if found["result"] != "ok":
            lines += ["", "```text", found["printed"].strip()[-2000:], "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), help="folder")
    parser.add_argument("--only", nargs="*", help="beginnings of the names of steps")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; --device cpu rehearses the steps in small")
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    variables |= {"HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    report: dict[str, Any] = {"machine": machine(), "steps": {}}
    deadline = time.monotonic() + BUDGET
    for step in steps(options.device, folder):
        if options.only and not step.name.startswith(tuple(options.only)):
            continue
        left = max(1.0, min(step.seconds, deadline - time.monotonic()))
        found = report["steps"][step.name] = run(step, left, variables)
        print(f"{step.name}: {found['result']}, {found['seconds']:.0f} s", flush=True)
        (folder / "gpu_check.json").write_text(json.dumps(report, indent=1))
        (folder / "gpu_check.md").write_text(markdown(report))
    sys.exit(any(found["result"] != "ok" for found in report["steps"].values()))


if __name__ == "__main__":
    main()
