"""The main job through the real launcher: metrics, resuming, ranks, ZeRO stages, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from alto_ds.pretrain.report import read_metrics
from tests import launcher

pytest.importorskip("deepspeed")

STEPS = 16


def command(folder: Path, output: str, stage: int = 2, **more: Any) -> list[str]:
    """A run of 16 steps on a little text; results go to ``folder/output``."""
    config = json.loads((launcher.ROOT / f"configs/gpt2_tiny_zero{stage}.json").read_text())
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    config["scheduler"]["params"] |= {"total_num_steps": STEPS, "warmup_num_steps": 4}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    stdlib = Path(sysconfig.get_path("stdlib"))
    options = {
        "deepspeed_config": path,
        "model": "gpt2-tiny",
        "output_dir": folder / output,
        "seq_length": 32,
        "vocab_size": 400,
        "eval_interval": 8,
        "save_interval": 5,
        "dropout": 0.0,
        "validation_fraction": 0.1,
    } | more
    pairs = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    texts = [str(stdlib / name) for name in ("argparse.py", "ast.py", "inspect.py")]
    return ["examples/pretrain_gpt2.py", *pairs, "--text", *texts]


@pytest.fixture(scope="module")
def straight(folder: Path) -> str:
    """What a run on 2 ranks printed that nobody interrupted; its results are in "straight"."""
    return launcher.run(2, *command(folder, "straight", dropout=0.1), folder=folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder / "model").state_dict()


def test_a_run_leaves_metrics_curves_and_a_model(folder: Path, straight: str) -> None:
    rows = read_metrics(folder / "straight/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert all(keys <= row.keys() for row in rows)
    assert rows[-1]["tokens"] == STEPS * 8 * 32
    assert [row["step"] for row in rows if "val_ppl" in row] == [4, 8, 16]  # 4: after warm-up
    assert rows[-1]["val_ppl"] < rows[3]["val_ppl"]
    assert rows[-1]["lr"] < max(row["lr"] for row in rows) == pytest.approx(0.02)
    assert (folder / "straight/curves.png").stat().st_size > 10_000
    assert f"Final held-out perplexity {rows[-1]['val_ppl']:.2f}" in straight
    assert "ppl=" in straight  # of the progress bar
    model = weights(folder / "straight")
    assert model["transformer.wte.weight"].shape == (448, 128)  # 400 tokens, in multiples of 64


def test_a_run_that_was_interrupted_goes_on_bitwise(folder: Path, straight: str) -> None:
    """Ctrl-C as a terminal sends it; dropout and the optimizer's states go on as well."""
    arguments = command(folder, "interrupted", dropout=0.1)
    process = launcher.start(2, *arguments, folder=folder)
    metrics = folder / "interrupted/metrics.jsonl"
    deadline = time.monotonic() + 200
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    done = len(read_metrics(metrics))
    assert 3 <= done < STEPS, output[-3000:]
    resumed = launcher.run(2, *arguments, folder=folder)
    assert "Final held-out perplexity" in resumed
    expected, found = (
        [
            {key: value for key, value in row.items() if key != "tokens_per_second"}
            for row in read_metrics(folder / name / "metrics.jsonl")
        ]
        for name in ("straight", "interrupted")
    )
    assert found == expected
    left, right = weights(folder / "straight"), weights(folder / "interrupted")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 1), (2, 3)])
def test_ranks_and_stages_do_not_matter(
    folder: Path, two_ranks: Path, ranks: int, stage: int
) -> None:
    name = f"{ranks}-zero{stage}"
    launcher.run(ranks, *command(folder, name, stage), folder=folder)
    expected = read_metrics(two_ranks / "metrics.jsonl")
    found = read_metrics(folder / name / "metrics.jsonl")
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), row["step"]
        assert row.get("val_loss", 0) == pytest.approx(other.get("val_loss", 0), rel=1e-4)
    left, right = weights(folder / name), weights(two_ranks)
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[n], right[n], rtol=1e-2, atol=1e-3) for n in left)


def test_resuming_with_other_settings_is_refused(folder: Path, straight: str) -> None:
    arguments = command(folder, "straight", dropout=0.2, seed=4321, vocab_size=500)
    path = folder / "zero2.json"
    config = json.loads(path.read_text())
    config["optimizer"]["params"]["lr"] = 0.5
    path.write_text(json.dumps(config))
    output = launcher.run(1, *arguments, folder=folder, fails=True)
    assert "was started with seed=1234, now 4321; " in output
    assert "dropout=0.1, now 0.2; vocab_size=400, now 500; " in output
    assert "optimizer.params.lr=0.02, now 0.5; " in output
    assert "ranks=2, now 1. Use the same settings" in output
    assert "another --output_dir" in output


def test_text_that_is_missing_ends_all_ranks(folder: Path) -> None:
    arguments = [*command(folder, "missing"), "no_such_file.txt"]
    began = time.monotonic()
    output = launcher.run(2, *arguments, folder=folder, fails=True)
    assert "--text names files that do not exist: no_such_file.txt" in output
    assert time.monotonic() - began < 100


@pytest.mark.parametrize("size", ["tiny", "345m"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_configurations_are_what_the_readme_says(size: str, stage: int) -> None:
    config = json.loads((launcher.ROOT / f"configs/gpt2_{size}_zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert config["optimizer"]["type"] == "ALTO"
    assert config["gradient_clipping"] == 1.0
    if size == "345m":
        assert config["train_batch_size"] == 4096
        assert config["train_micro_batch_size_per_gpu"] == 4
        assert config["optimizer"]["params"]["lr"] == 1e-2
        assert config["scheduler"]["params"]["total_num_steps"] == 5000


def test_shell_scripts_parse() -> None:
    for script in [*launcher.ROOT.glob("launch/*.sh"), launcher.ROOT / ".ci/run"]:
        subprocess.run(["bash", "-n", script], check=True)
