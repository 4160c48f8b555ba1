"""Final runs keep the trust ratios of their layers, and train as they would without."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from alto_ds.compare import run
from alto_ds.compare.files import curve_file, ratios_file
from alto_ds.compare.run import Conditions, Run, finish
from alto_ds.compare.spec import Entry, SearchSettings, Spec, VisionSettings

STEPS = 50
TYPES: dict[str, dict[str, Any]] = {
    "ALTO": {"lr": 0.03, "weight_decay": 0.01},
    "E": {"optimizer": "LAMB", "alpha": -5, "beta": 0.99, "lr": 0.03},
    "AdamW": {"lr": 0.003},
}
SPEC = Spec(
    task=VisionSettings(type="vision", dataset="digits", hidden=[8]),
    optimizers={name: Entry(type=name, params=params) for name, params in TYPES.items()},
    search=SearchSettings(method="random", trials=1),
    seeds=[1],
    batch_size=32,
    steps=STEPS,
)


def done(kind: str, stage: str, folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The losses of a run, and the rows of its trust ratios."""
    for name in ("runs", "curves", "ratios"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    conditions = Conditions(fingerprint="", device="cpu", versions={})
    one = Run(
        optimizer=kind, type=kind, params=TYPES[kind], stage=stage, seed=1, conditions=conditions
    )
    assert finish(one, SPEC, folder)["diverged"] is None
    paths = [function(folder, one.key(SPEC)) for function in (curve_file, ratios_file)]
    curve, ratios = (
        [*csv.DictReader(path.read_text().splitlines())] if path.exists() else [] for path in paths
    )
    return [row["loss"] for row in curve], ratios


@pytest.mark.parametrize("kind", TYPES)
def test_a_final_run_records_ratios_by_layer_and_its_losses_are_bitwise_as_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, ratios = done(kind, "final", tmp_path / "with")
    monkeypatch.setattr(run, "_recorded", lambda steps: set())
    bare, none = done(kind, "final", tmp_path / "without")
    assert losses == bare
    assert len(losses) == STEPS
    assert none == []
    if kind == "AdamW":
        assert ratios == []
        return
    steps = [*dict.fromkeys(int(row["step"]) for row in ratios)]
    assert steps == [int(2.5 * number) for number in range(1, 21)]
    layers = [row["layer"] for row in ratios[:2]]  # two matrices, and no bias
    assert len({*layers}) == 2
    assert [row["layer"] for row in ratios] == layers * len(steps)
    assert len({float(row["ratio"]) for row in ratios}) > len(steps)


def test_a_trial_records_none(tmp_path: Path) -> None:
    losses, ratios = done("ALTO", "search", tmp_path)
    assert len(losses) == STEPS
    assert ratios == []


def test_a_short_run_records_each_step() -> None:
    assert run._recorded(7) == {1, 2, 3, 4, 5, 6, 7}
    assert max(run._recorded(12345)) == 12345
    assert len(run._recorded(12345)) == 20
