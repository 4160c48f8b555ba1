"""A run can be watched: TensorBoard, DeepSpeed's monitors, the progress bar, the pictures."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain import curves, monitors
from alto_ds.pretrain.metrics import read_metrics
from alto_ds.pretrain.monitors import TAGS
from tests import launcher
from tests.pretrain.forked import Forks
from tests.pretrain.runs import MODULE, STEPS, options

LAYER = "transformer.h.0.attn.c_attn.weight"
# What a CPU in float32 has none of.
ELSEWHERE = {"train/loss_scale", "speed/mfu"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard's own reader finds them."""
    events = events_of(folder)
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def events_of(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # 0: keep all
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def in_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each file of DeepSpeed's CSV monitor, each below one heading."""
    found = {}
    for path in folder.glob("*"):
        with path.open(newline="") as file:
            heading, *rows = csv.reader(file)
        assert heading[0] == "step"
        assert path.suffix == ".csv"
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    return found


def measured(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, of ``metrics.jsonl``."""
    rows = read_metrics(folder / "metrics.jsonl")
    found = {
        tag: [(row["step"], row[name]) for row in rows if name in row]
        for name, tag in TAGS.items()
        if tag not in ELSEWHERE
    }
    evaluated = [row for row in rows if "trust_ratios" in row]
    for layer in evaluated[0]["trust_ratios"] if evaluated else ():
        found[f"trust_ratio_of/{layer}"] = [
            (row["step"], row["trust_ratios"][layer]) for row in evaluated
        ]
    return found


def test_tensorboard_shows_by_default_what_the_metrics_say(folder: Path, straight: str) -> None:
    run = folder / "straight"
    found, expected = scalars(run / "tensorboard"), measured(run)
    assert found.keys() == expected.keys()
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    for tag, values in expected.items():
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], tag
    assert not (run / "csv").exists()
    losses = dict(found["train/loss"])
    for step, perplexity in found["train/perplexity"]:
        assert perplexity == pytest.approx(math.exp(losses[step]), rel=1e-5)
    assert 0.05 < found["memory/peak_gib"][-1][1] < 24


def test_the_progress_bar_tells_the_time_left(straight: str) -> None:
    assert re.search(rf"\d+/{STEPS} \[\d\d:\d\d<\d\d:\d\d, .*step/s", straight)


def test_a_resumed_run_shows_each_step_once(tmp_path: Path, forks: Forks) -> None:
    """Killed after step 7, it goes on from its checkpoint of step 5."""
    arguments = [*options(tmp_path, "run"), "--trust_ratios_by_layer"]
    path = tmp_path / "zero2.json"
    run = tmp_path / "run"
    # Where the run puts them by default, and DeepSpeed does not.
    section = {"enabled": True, "output_path": str(run), "job_name": "csv"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"csv_monitor": section}))
    forks.run(1, *arguments, "--max_steps", "7")
    assert [step for step, _ in scalars(run / "tensorboard")["train/loss"]] == [*range(1, 8)]
    shutil.rmtree(run / "checkpoints/step0000007")
    shutil.rmtree(run / "model")
    forks.run(1, *arguments)

    expected, of_csv = measured(run), in_csv(run / "csv")
    found = scalars(run / "tensorboard")
    assert [step for step, _ in expected["train/loss"]] == [*range(1, STEPS + 1)]
    assert f"trust_ratio_of/{LAYER}" in expected
    # Nothing besides, such as DeepSpeed's own Train/Samples/lr.
    assert found.keys() == expected.keys()
    assert of_csv.keys() == {tag.replace("/", "_") for tag in expected}
    for tag, values in expected.items():
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], tag
        assert of_csv[tag.replace("/", "_")] == values, tag

    histograms = events_of(run / "tensorboard").Histograms("trust_ratio/layers")
    assert [event.step for event in histograms] == [2, 5, 10, 12]
    assert all(event.histogram_value.num == 10 for event in histograms)
    for name in ("curves.png", "trust_ratios.png"):
        assert (run / name).stat().st_size > 10_000


def test_lines_of_csv_that_were_cut_off_or_will_be_done_again_are_left_out(tmp_path: Path) -> None:
    text = {"whole": "step,loss\n1,0.5\n2,0.25\n3,0.125\n", "cut": "step,lr\n1,0.5\n2,0.5\n3"}
    for name, lines in (text | {"empty": ""}).items():
        (tmp_path / f"{name}.csv").write_text(lines)
    monitor = SimpleNamespace(log_dir=str(tmp_path), filenames=[])
    monitors._go_on(monitor, 2)
    assert in_csv(tmp_path) == {"whole": [(1, 0.5), (2, 0.25)], "cut": [(1, 0.5), (2, 0.5)]} | {
        "empty": []
    }
    assert sorted(monitor.filenames) == ["cut", "empty", "whole"]  # need no heading


@pytest.mark.parametrize("section", list(monitors.PACKAGES))
def test_a_monitor_whose_package_is_missing_is_refused(
    section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitors, "_is_installed", lambda package: False)
    monitors.check_installed({"csv_monitor": {"enabled": True}, section: {"enabled": False}})
    with pytest.raises(
        ValueError, match=rf"{section}.enabled=true needs the package .*pip install"
    ):
        monitors.check_installed({section: {"enabled": True}})


@pytest.mark.parametrize("ratios", [{}, {"b": 0.0}, {"a": math.nan, "b": 2.0}])
def test_what_is_missing_or_not_finite_does_not_stop_the_pictures(
    tmp_path: Path, ratios: dict[str, float]
) -> None:
    first = {"step": 1, "loss": 3.0, "lr": 0.1}
    last = first | {"step": 2, "loss": math.nan, "grad_norm": math.inf, "val_loss": 2.0}
    last |= {f"trust_ratio_{name}": math.nan for name in ("min", "median", "max")}
    curves.draw_curves([first, last], tmp_path / "curves.png")
    curves.draw_curves([first], tmp_path / "curves.png")
    curves.draw_trust_ratios({1: {"a": 1.0}, 2: ratios}, tmp_path / "trust_ratios.png")
    curves.draw_trust_ratios({1: {"a": math.nan}}, tmp_path / "trust_ratios.png")


@pytest.mark.slow
def test_wandb_gets_each_step(
    tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: its file in the folder that WANDB_DIR names has the last step's numbers."""
    pytest.importorskip("wandb")
    arguments = options(tmp_path, "run", max_steps=2)
    path = tmp_path / "zero2.json"
    config = json.loads(path.read_text()) | {"wandb": {"enabled": True, "project": "alto"}}
    path.write_text(json.dumps(config))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    launcher.run(1, "--module", MODULE, *arguments, folder=tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert all(tag.encode() in file.read_bytes() for tag in ("train/loss", "held_out/loss"))
