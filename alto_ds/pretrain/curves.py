"""Pictures of a run: its curves, and the trust ratios of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.colors import LogNorm


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses, learning rate, gradient norm and trust ratios over steps.

    Args:
        rows: of ``metrics.jsonl``.
        path: of the picture.
    """
    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    loss, lr, norm, ratio = axes.flat
    loss.plot(steps, [row["loss"] for row in rows], label="training", linewidth=1)
    loss.plot(*_points(rows, "val_loss"), "o-", label="held-out", markersize=4)
    loss.legend()
    lr.plot(steps, [row["lr"] for row in rows])
    norm.plot(steps, [_number(row.get("grad_norm")) for row in rows])
    for name in ("max", "median", "min"):
        ratio.plot(*_points(rows, f"trust_ratio_{name}"), "o-", label=name, markersize=4)
    if any("trust_ratio_max" in row for row in rows):
        ratio.set_yscale("log")
        ratio.legend()
    for axis, title in (
        *((loss, "loss (nats per token)"), (lr, "learning rate"), (norm, "gradient norm")),
        (ratio, "trust ratio of the layers"),
    ):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_trust_ratios(by_step: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """A row for each layer and a column for each step; colours tell the trust ratio.

    Args:
        by_step: of each step, the ratios of the same layers by their names.
        path: of the picture.
    """
    layers = list(dict.fromkeys(name for ratios in by_step.values() for name in ratios))
    table = np.array([[_number(r.get(name)) for r in by_step.values()] for name in layers])
    table[~(table > 0)] = math.nan  # which have no logarithm, and stay white
    size = (4 + min(0.3 * len(by_step) + 4, 14), 1.5 + 0.2 * len(layers))
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    norm = LogNorm() if np.isfinite(table).any() else None
    image = axis.imshow(table, aspect="auto", interpolation="none", norm=norm)
    shown = range(0, len(by_step), -(-len(by_step) // 20))
    axis.set_xticks(shown, [list(by_step)[column] for column in shown])
    axis.set_yticks(range(len(layers)), layers, fontsize=8)
    axis.set(title="trust ratio", xlabel="step")
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [row for row in rows if key in row]
    return [row["step"] for row in found], [row[key] for row in found]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
