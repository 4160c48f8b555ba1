"""Train best settings of a comparison anew, by the plain main job and with other seeds.

.. code-block:: bash

    python examples/study/confirm.py examples/study/specs/alpha.yaml runs/study/alpha LAMB

Each run is ``deepspeed --module alto_ds.pretrain`` on two ranks under ZeRO-1, on the training text
and tokenizer of the comparison. Its model is evaluated on the comparison's test text. A mean of
the new seeds agrees where it differs from the table's by no more than t · s · √(1/n + 1/m), with
the pooled standard deviation s, as in Student's test of two means.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alto_ds.compare.run import warmup_steps
from alto_ds.compare.spec import Spec, TextSettings, read_spec
from alto_ds.compare.tables import t_quantile
from alto_ds.compare.text import TextTask
from alto_ds.pretrain.model import GPT2LMHeadModel

RANKS = 2
MODEL = ("model", "n_layer", "n_embd", "n_head", "seq_length", "dropout")


def main() -> None:
    """Run what is not there yet, print a row for each optimizer, exit with 1 where one differs."""
    parser = argparse.ArgumentParser(description="Repeat best settings by the main job.")
    parser.add_argument("spec", type=Path, help="of the comparison, on text")
    parser.add_argument("comparison", type=Path, help="folder that alto_ds.compare has written")
    parser.add_argument("optimizers", nargs="+", help="ALTO, LAMB or AdamW, by their names in it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    given = parser.parse_args()
    spec = read_spec(given.spec)
    assert isinstance(spec.task, TextSettings)
    with (given.comparison / "runs.csv").open(newline="") as file:
        finals = [row for row in csv.DictReader(file) if row["stage"] == "final"]
    task = TextTask(spec.task, given.comparison / "data")
    agree = True
    print("| optimizer | table | main job | may differ by | agree |\n|---|---|---|---|---|")
    for name in given.optimizers:
        rows = [row for row in finals if row["optimizer"] == name]
        expected = [float(row["test_perplexity"]) for row in rows]
        found = []
        for seed in given.seeds:
            model = train(given.comparison, spec, rows[0], seed)
            found.append(task.evaluate(model, "test", spec.micro)["perplexity"])
        allowed = half_width(expected, found)
        means = statistics.fmean(expected), statistics.fmean(found)
        agrees = abs(means[0] - means[1]) <= allowed
        agree &= agrees
        numbers = f"{means[0]:.2f} | {means[1]:.2f} | {allowed:.2f}"
        print(f"| {name} | {numbers} | {'yes' if agrees else 'NO'} |", flush=True)
    sys.exit(not agree)


def train(comparison: Path, spec: Spec, row: Mapping[str, str], seed: int) -> GPT2LMHeadModel:
    """Train by the main job, where that has not been done, and return the model."""
    output = (comparison / "confirmed" / row["optimizer"].replace(" ", "_") / str(seed)).resolve()
    output.mkdir(parents=True, exist_ok=True)
    config = output / "deepspeed.json"
    config.write_text(json.dumps(deepspeed_config(spec, row["type"], json.loads(row["params"]))))
    given: dict[str, Any] = {name: getattr(spec.task, name) for name in MODEL}
    given |= {
        "deepspeed_config": config,
        "output_dir": output,
        "seed": seed,
        "dataset": (comparison / "data/train.jsonl").resolve(),
        "tokenizer": (comparison / "data/tokenizer").resolve(),
    }
    words = [word for k, v in given.items() if v is not None for word in (f"--{k}", str(v))]
    words.append("--no-compile")  # which would take longer than such a short run
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", str(RANKS)]
    with (output / "log.txt").open("a") as log:
        subprocess.run(
            [*map(str, command), "--module", "alto_ds.pretrain", *words],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return GPT2LMHeadModel.from_pretrained(output / "model")


def deepspeed_config(spec: Spec, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """The JSON with which the main job trains as the comparison does."""
    if kind == "LAMB":
        kind, params = "ALTO", {**params, "alpha": 0, "betas": [0.99, *params["betas"]]}
    elif kind == "AdamW":
        params = {**params, "torch_adam": True}
    return {
        "train_batch_size": spec.batch_size,
        "train_micro_batch_size_per_gpu": min(spec.micro, spec.batch_size // RANKS),
        "optimizer": {"type": kind, "params": params},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": spec.total_steps,
                "warmup_num_steps": warmup_steps(spec),
                "cos_min_ratio": spec.schedule.floor,
            },
        },
        "gradient_clipping": spec.gradient_clipping,
        "zero_optimization": {"stage": 1},
    }


def half_width(first: list[float], second: list[float]) -> float:
    """Of the 95 % interval of the difference of two means, of equal variance."""
    freedom = len(first) + len(second) - 2
    squares = sum((len(x) - 1) * statistics.variance(x) for x in (first, second))
    return t_quantile(freedom) * math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second)))


if __name__ == "__main__":
    main()
