"""A small run of the main job: its options, and what it leaves."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import torch

from alto_ds.pretrain.metrics import read_metrics
from tests.launcher import ROOT

MODULE = "alto_ds.pretrain"
STEPS = 12
STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [STDLIB / name for name in ("argparse.py", "ast.py", "inspect.py")]


def options(folder: Path, output: str, stage: int = 2, **more: Any) -> list[str]:
    """Options of 12 steps on a little text, with dropout; results go to ``folder/output``."""
    config = json.loads((ROOT / f"configs/gpt2-tiny/zero{stage}.json").read_text())
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    config["scheduler"]["params"] |= {"total_num_steps": STEPS, "warmup_num_steps": 2}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    values = {
        "deepspeed_config": path,
        "model": "gpt2-tiny",
        "output_dir": folder / output,
        "seq_length": 32,
        "vocab_size": 400,
        "eval_interval": 5,
        "save_interval": 5,
        "dropout": 0.1,
        "validation_fraction": 0.1,
        "validation_sequences": 100,
    } | more
    pairs = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return [*pairs, "--text", *map(str, TEXTS)]


def measured(folder: Path) -> list[dict[str, Any]]:
    """All that a run has measured at each step, times and memory aside."""
    rows = read_metrics(folder / "metrics.jsonl")
    speed = ("tokens_per_second", "tflops", "mfu", "memory_gib")
    return [{k: v for k, v in row.items() if k not in speed} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the model that a run has saved."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder / "model").state_dict()
