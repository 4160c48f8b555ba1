"""What does a run leave to look at? The progress bar, ``metrics.jsonl`` and the pictures."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from alto_ds import ALTO
from alto_ds.checkpoint.deepspeed_files import optimizers_of
from alto_ds.files import replace_text
from alto_ds.pretrain.identity import write_json
from alto_ds.pretrain.monitors import Monitors

DIVERGED = "diverged.json"


class Metrics:
    """Written by rank 0; on other ranks every method does nothing.

    Args:
        folder: the run's output folder.
        first_step: steps that were done before; later lines in the file are dropped, for they
            come from steps after the checkpoint, and so does :data:`DIVERGED`.
        last_step: number of the last step.
        active: whether this is rank 0.
        monitors: which are told of each step, too.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        last_step: int,
        active: bool,
        monitors: Monitors | None = None,
    ) -> None:
        self.folder = folder
        self.active = active
        self.monitors = monitors
        if not active:
            return
        self.path = folder / "metrics.jsonl"
        rows, broken = _read_rows(self.path)
        if broken:
            print(
                f"{self.path}: left out line {', '.join(map(str, broken))}, which cannot be read; "
                f"kept the other {len(rows)}.",
                file=sys.stderr,
            )
        rows = [row for row in rows if row["step"] <= first_step]
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        (folder / DIVERGED).unlink(missing_ok=True)
        self.last = first_step
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  open for the whole run
        self.bar = tqdm(
            total=last_step, initial=first_step, unit="step", desc="Training", dynamic_ncols=True
        )

    def step(self, row: dict[str, Any]) -> None:
        """Record one training step, and its evaluation where there was one."""
        if not self.active:
            return
        self.file.write(json.dumps(row) + "\n")
        self.last = row["step"]
        if self.monitors is not None:
            self.monitors.step(row)
        self.bar.update(row["step"] - self.bar.n)
        shown = {"loss": f"{row['loss']:.3f}", "ppl": f"{row['ppl']:.1f}"}
        if "tflops" in row:  # the step was not one of the first
            shown |= {"tokens_s": f"{row['tokens_per_second']:,.0f}"}
            shown |= {"mfu": f"{row['mfu']:.1%}"} if "mfu" in row else {}
        self.bar.set_postfix(shown)
        if "val_loss" in row:
            self.say(_evaluation_line(row))

    def diverged(self, why: str) -> None:
        """Write down that the step after the last one recorded has ended the run, and why."""
        if self.active:
            with contextlib.suppress(OSError):  # the user is to hear why, also with a full disk
                write_json(self.folder / DIVERGED, {"step": self.last + 1, "why": why})

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self.bar.write(line)

    def close(self) -> None:
        """End the progress bar and the files."""
        if self.active:
            self.bar.close()
            self.file.close()
        if self.monitors is not None:
            self.monitors.close()

    def draw(self) -> None:
        """Write ``curves.png``, and ``trust_ratios.png`` where there are those of each layer."""
        if self.active:
            from alto_ds.pretrain import curves  # imports matplotlib, which takes its time

            rows = read_metrics(self.path)
            curves.draw_curves(rows, self.folder / "curves.png")
            by_layer = {row["step"]: row["trust_ratios"] for row in rows if row.get("trust_ratios")}
            if by_layer:
                curves.draw_trust_ratios(by_layer, self.folder / "trust_ratios.png")


def alto_of(engine: Any) -> ALTO | None:
    """The ALTO inside the engine's wrappers; None where another optimizer trains."""
    return next((found for found in optimizers_of(engine) if isinstance(found, ALTO)), None)


def trust_ratios_of(engine: Any) -> dict[str, float] | None:
    """How the latest step scaled the layers: the trust ratio of each that is scaled, by name.

    Needs no communication, and waits for the device. The same on every rank.

    Args:
        engine: DeepSpeed's engine, of whose optimizer wrappers the innermost may be ALTO.

    Returns:
        None where the optimizer has no trust ratios.
    """
    optimizer = alto_of(engine)
    return None if optimizer is None else scaled_ratios(optimizer, engine.module)


def scaled_ratios(optimizer: ALTO, model: nn.Module) -> dict[str, float]:
    """The trust ratios of an optimizer's latest step; see :func:`trust_ratios_of`."""
    layers = optimizer.trust_ratios(model.named_parameters())
    return {name: layer.ratio for name, layer in layers.items() if layer.scaled}


def trust_ratio_metrics(trust_ratios: Mapping[str, float]) -> dict[str, float]:
    """The smallest, median and largest trust ratio of a step.

    Args:
        trust_ratios: of the layers that are scaled.

    Returns:
        The number of scaled layers in ``layers_scaled``, and the three over them where there are
        any; all NaN where a layer's is.
    """
    ratios = trust_ratios.values()
    if not ratios:
        return {"layers_scaled": 0}
    low, median, high = min(ratios), statistics.median(ratios), max(ratios)
    if any(map(math.isnan, ratios)):  # which comparisons would pass over
        low = median = high = math.nan
    return {
        "trust_ratio_min": low,
        "trust_ratio_median": median,
        "trust_ratio_max": high,
        "layers_scaled": len(ratios),
    }


def _evaluation_line(row: dict[str, Any]) -> str:
    line = (
        f"step {row['step']}: held-out loss {row['val_loss']:.4f}, perplexity {row['val_ppl']:.2f}"
    )
    if "trust_ratio_median" in row:
        line += f", median trust ratio {row['trust_ratio_median']:.3g}"
    return line


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without broken lines; none where there is no file."""
    return _read_rows(path)[0]


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file, and the numbers of lines that are none, counted from 1.

    The last line is not among these where it has no end: the run was killed while writing it.
    """
    if not path.exists():
        return [], []
    lines = path.read_bytes().split(b"\n")
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            broken.append(number)
    return rows, broken


def _row(line: bytes) -> dict[str, Any] | None:
    """A row with all that the curves are drawn of, None where a line is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    drawn = (row.get("loss"), row.get("lr"), row.get("val_loss", 0.0), row.get("grad_norm") or 0.0)
    return row if all(type(number) in (int, float) for number in drawn) else None
