"""Small folders as the comparison and the main job write them, without training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alto_ds.compare.files import curve_file, ratios_file
from alto_ds.compare.spec import Entry, SearchSettings, Spec, TextSettings
from alto_ds.compare.tables import summary, write_runs, write_table
from alto_ds.pretrain.held_out import write_held_out

STEPS = 60
WHY = "step 7: loss nan, gradient norm nan"
LAYERS = [f"transformer.h.{block}.attn.c_attn.weight" for block in range(3)]


def write_comparison(
    folder: Path,
    optimizers: Sequence[str],
    batch_size: int = 8,
    steps: int = STEPS,
    metric: str = "perplexity",
) -> Path:
    """A finished comparison with three rates and two seeds; of ``SGD`` runs have diverged.

    Every number differs from every other one, and from one batch size or length to another.
    With another metric it is one of image classification. ``ALTO`` has trust ratios, and a
    sharpness of 10 times the seed.
    """
    for name in ("curves", "runs", "ratios"):
        (folder / name).mkdir(parents=True)
    rates = [1e-3, 1e-2, 1e-1]
    spec = Spec(
        task=TextSettings(files=["text.txt"]),
        optimizers={
            name: Entry(type="AdamW", params={"weight_decay": 0.1}, search={"lr": rates})
            for name in optimizers
        },
        search=SearchSettings(method="grid", trials=3),
        seeds=[1, 2],
        batch_size=batch_size,
        steps=steps,
    )
    versions = {"versions": {"torch": "1.2.3"}}
    about = dataclasses.asdict(spec) | versions
    if metric != "perplexity":
        about["task"] = {"type": "vision", "dataset": "digits"}
    (folder / "spec.json").write_text(json.dumps(about))
    runs, rows = [], []
    for place, name in enumerate(optimizers, start=1):
        level = place + 1 / batch_size + 1 / steps
        trials = [
            _run(
                folder,
                name,
                rate,
                0,
                level + number / 7,
                name == "SGD" and number == 2,
                steps,
                metric,
            )
            | {"trial": number}
            for number, rate in enumerate(rates)
        ]
        finals = [
            _run(
                folder,
                name,
                rates[0],
                seed,
                level + seed / 9,
                name == "SGD" and seed == 2,
                steps,
                metric,
            )
            for seed in spec.seeds
        ]
        edges = ["lr=0.001 at the low end"]
        rows.append(summary(trials, trials[0], finals, edges, metric))
        runs += [*trials, *finals]
    write_runs(folder, runs)
    write_table(folder, rows, metric)
    return folder


def _run(
    folder: Path,
    optimizer: str,
    lr: float,
    seed: int,
    loss: float,
    diverged: bool,
    steps: int,
    metric: str,
) -> dict[str, Any]:
    key = f"{optimizer}-{lr}-{seed}".replace(" ", "_")
    steps = 6 if diverged else steps
    curve = [
        f"{s},{s * 256},{s / 10},{loss + 3 * math.exp(-s / 20)!r}" for s in range(1, steps + 1)
    ]
    curve_file(folder, key).write_text("\n".join(["step,tokens,seconds,loss", *curve, ""]))
    if optimizer == "ALTO" and seed:
        ratios = [f"{s},{layer},{s * seed}" for s in (steps // 2, steps) for layer in LAYERS]
        ratios_file(folder, key).write_text("\n".join(["step,layer,ratio", *ratios, ""]))
    metrics = {"loss": loss, metric: math.exp(loss)}
    return {
        **{"optimizer": optimizer, "type": "AdamW", "params": {"weight_decay": 0.1, "lr": lr}},
        **{"stage": "final" if seed else "search", "seed": seed, "device": "cpu"},
        **{"diverged": WHY if diverged else None, "steps": steps, "seconds": steps / 10},
        "validation": None if diverged else metrics,
        "test": metrics if seed and not diverged else None,
        **({"sharpness": 10.0 * seed} if optimizer == "ALTO" and seed else {}),
        **{"run": key, "trial": None},
    }


def write_run(
    folder: Path,
    seed: int = 1,
    optimizer: str = "ALTO",
    lr: float = 0.01,
    loss: float = 4.0,
    batch_size: int = 8,
    **identity: Any,
) -> Path:
    """A finished run of the main job, without its model; evaluated at half and all of the steps."""
    folder.mkdir()
    settings = {
        **{"model": "gpt2-tiny", "seq_length": 32, "seed": seed, "train_batch_size": batch_size},
        "optimizer": {"type": optimizer, "params": {"lr": lr}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS}},
        "data": f"of seed {seed}",
    } | identity
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "versions.json").write_text(json.dumps({"torch": "4.5.6"}))
    rows = []
    for step in range(1, STEPS + 1):
        now = loss + 3 * math.exp(-step / 20)
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * 256,
            "loss": now,
            "ppl": math.exp(now),
        }
        row |= {"lr": lr, "grad_norm": 1.0, "tokens_per_second": 512.0}
        if step in (STEPS // 2, STEPS):
            row |= {"val_loss": now, "val_ppl": math.exp(now)}
            row["trust_ratios"] = {layer: 0.1 * step + n for n, layer in enumerate(LAYERS)}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_model() -> GPT2LMHeadModel:
    """A GPT-2 of 372 parameters, the same at each call, with weights that are not small."""
    size = {"vocab_size": 16, "n_positions": 6, "n_embd": 4, "n_layer": 1, "n_head": 2}
    torch.manual_seed(3)
    config = GPT2Config(**size, bos_token_id=0, eos_token_id=0, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def add_model(run: Path, sequences: int = 20) -> torch.Tensor:
    """Give a run the tiny model, a tokenizer and held-out text, which is returned."""
    tiny_model().save_pretrained(run / "model")
    words = WordLevel({"<end>": 0, **{f"w{token}": token for token in range(1, 16)}}, "<end>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>")
    tokenizer.save_pretrained(run / "model")
    tokens = torch.randint(16, (sequences, 6), generator=torch.Generator().manual_seed(5))
    write_held_out(run, tokens)
    return tokens
