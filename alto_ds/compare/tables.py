"""What came out: ``runs.csv``, ``table.csv`` and ``table.md``."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from alto_ds.compare.task import PARTS
from alto_ds.files import replace_text

CONFIDENCE = 0.95
SHARPNESS = ("sharpness", "sharpness_residual")


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = confidence, for Student's distribution.

    Args:
        freedom: degrees of freedom, at least 1.
        confidence: in (0, 1).
    """
    return float(stats.t.ppf((1 + confidence) / 2, freedom))


class OverSeeds(NamedTuple):
    """What values of several seeds say.

    Attributes:
        mean: infinite where one of them is not finite.
        interval: half the width of the mean's interval; None for one seed, or an infinite mean.
        deviation: standard deviation; likewise.
    """

    mean: float
    interval: float | None
    deviation: float | None


def over(values: Sequence[float]) -> OverSeeds:
    """Mean, interval by Student's t, and standard deviation."""
    if not all(map(math.isfinite, values)):
        return OverSeeds(math.inf, None, None)
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return OverSeeds(mean, None, None)
    deviation = statistics.stdev(values)
    return OverSeeds(mean, t_quantile(count - 1) * deviation / math.sqrt(count), deviation)


def write_runs(folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write ``runs.csv``, one row for each trial and each final run.

    Args:
        folder: of the comparison.
        runs: results with the keys ``trial``, None for final runs, and ``run``, the name of their
            files, besides those of :func:`alto_ds.compare.run.finish`.
    """
    names = _metrics(runs)
    measured = [name for name in SHARPNESS if any(name in run for run in runs)]
    rows = [
        {
            **{name: run[name] for name in ("optimizer", "type", "stage")},
            "trial": "" if run["trial"] is None else run["trial"],
            "seed": run["seed"],
            "params": json.dumps(run["params"]),
            **{f"{part}_{name}": _metric(run, part, name) for part in PARTS for name in names},
            **{name: run.get(name, "") for name in measured},
            "diverged": int(run["diverged"] is not None),
            "why": run["diverged"] or "",
            **{name: run[name] for name in ("steps", "seconds", "run")},
        }
        for run in runs
    ]
    replace_text(folder / "runs.csv", _csv(rows))


def summary(
    trials: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    finals: Sequence[Mapping[str, Any]],
    edges: Sequence[str],
    headline: str,
) -> dict[str, Any]:
    """A row of the table.

    A run that has diverged counts as infinitely bad, so one of them makes the mean infinite.
    """
    values = [_metric(run, "test", headline) for run in finals]
    over_seeds = over(values)
    return {
        "optimizer": best["optimizer"],
        "type": best["type"],
        f"test_{headline}": over_seeds.mean,
        "interval_95": over_seeds.interval,
        "standard_deviation": over_seeds.deviation,
        "lowest": min(values),
        "highest": max(values),
        "seeds": len(values),
        "diverged_final": sum(run["diverged"] is not None for run in finals),
        "validation_loss": _metric(best, "validation", "loss"),
        "trials": len(trials),
        "diverged_search": sum(run["diverged"] is not None for run in trials),
        "params": json.dumps(best["params"]),
        "edges": "; ".join(edges),
    }


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]], headline: str) -> str:
    """Write ``table.csv`` and ``table.md``, the best first, and return the latter."""
    rows = sorted(rows, key=lambda row: row[f"test_{headline}"])
    replace_text(folder / "table.csv", _csv(rows))
    lines = [
        f"| optimizer | test {headline} (95 %) | standard deviation | seeds (diverged) | "
        "trials (diverged) | best setting | at an edge |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        params = ", ".join(f"{k} {_shown(v)}" for k, v in json.loads(row["params"]).items())
        mean, half, spread = (
            row[key] for key in (f"test_{headline}", "interval_95", "standard_deviation")
        )
        result = _shown(mean) if half is None else f"{mean:.2f} ± {half:.2f}"
        cells = (
            row["optimizer"],
            result if math.isfinite(mean) else "diverged",
            "" if spread is None else f"{spread:.3f}",
            f"{row['seeds']} ({row['diverged_final']})",
            f"{row['trials']} ({row['diverged_search']})",
            params,
            row["edges"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    replace_text(folder / "table.md", text)
    return text


def _metrics(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [run[part] for run in runs for part in PARTS if run[part]]
    return list(dict.fromkeys(name for metrics in found for name in metrics)) or ["loss"]


def _metric(run: Mapping[str, Any], part: str, name: str) -> Any:
    """Infinite where the run has diverged, empty where it was not looked at."""
    if run["diverged"] is not None and (part == "validation" or run["stage"] == "final"):
        return math.inf
    return "" if run[part] is None else run[part][name]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_shown, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
