"""The plan's figures against those of real ranks: elements, bytes that are sent, peak memory.

Each case is a launch of its own. The C library returns memory at once there
(``MALLOC_MMAP_THRESHOLD_``), so that resident memory is what tensors take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import alto_ds  # noqa: F401  registers the optimizer types
from alto_ds.plan import activations
from alto_ds.plan.job import read_job
from alto_ds.plan.memory import elements, memory
from alto_ds.plan.traffic import traffic
from alto_ds.pretrain.settings import ModelSettings
from tests.benchmarks.contenders import arguments, write
from tests.launcher import CPU, ROOT

VOCABULARY = 50257
MODELS: dict[str, dict[str, Any]] = {
    "45M": {"model": "gpt2", "n_layer": 6, "n_embd": 512, "n_head": 8, "seq_length": 128},
    "124M": {"model": "gpt2", "seq_length": 128},
}
SCRIPT = str(ROOT / "tests/scripts/measure_runs.py")
SMALL_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def row(model: str, stage: int, ranks: int) -> dict[str, Any]:
    """One line of the table; the most of any rank, and the bytes of rank 0."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "ALTO", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    settings = ModelSettings(**MODELS[model])
    job = read_job(
        config, settings, nodes=1, gpus_per_node=ranks, vocab_size=VOCABULARY, steps=None
    )
    passes = activations.measure(settings, VOCABULARY, job.dtype, job.micro_batch_size)
    planned = memory(job, passes, reserved=False).peak
    case = {"config": config, "model": MODELS[model], "vocab_size": VOCABULARY}
    found = _measure(ranks, case)
    sent = sum(found[0]["sent"].values()) if ranks > 1 else 0
    sent_planned = sum(kind.bytes for kind in traffic(job))
    peak = max(rank["peak"] for rank in found)
    return {
        "model": model,
        "ZeRO": stage,
        "ranks": ranks,
        "elements a rank": found[0]["elements"],
        "planned": elements(job),
        "sent, MB": sent / 1e6,
        "sent, planned": sent_planned / 1e6,
        "off by": f"{sent_planned / sent - 1:+.4%}" if sent else "",
        "peak, MB": round(peak / 1e6),
        "peak, planned": round(planned / 1e6),
        "peak off by": f"{planned / peak - 1:+.1%}",
    }


def _measure(ranks: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        # A small model first: what is loaded once is not the model's.
        cases = [case | {"model": {"model": "gpt2-tiny"}}, case]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [*launch, f"--nproc_per_node={ranks}", SCRIPT, str(report), json.dumps(cases)],
            env=os.environ | CPU | SMALL_BLOCKS | {"PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.loads(report.read_text())[-1]


def main() -> None:
    cases = [
        (model, stage, ranks) for model in MODELS for stage in (1, 2, 3) for ranks in (1, 2, 4)
    ]
    write(arguments().report, [row(*case) for case in cases])


if __name__ == "__main__":
    main()
