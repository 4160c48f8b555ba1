"""What is in the folders? Comparisons and runs become the same plain data."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alto_ds.compare.files import curve_file, ratios_file
from alto_ds.compare.tables import over
from alto_ds.pretrain.identity import FILE, VERSIONS
from alto_ds.pretrain.metrics import DIVERGED, read_metrics

Kind = TypeVar("Kind")

SPEC = "spec.json"
METRICS = "metrics.jsonl"
# What may differ between runs that are seeds of one setting. A seed holds out other documents, of
# which "data" is a fingerprint, too.
OF_SEEDS = ("seed", "data", "ranks")
# What is compared, not what makes a comparison unfair.
COMPARED = ("optimizer", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run was at a step.

    Attributes:
        step: optimizer steps done.
        tokens: that were trained on; examples where these are not made of tokens.
        seconds: of training, without evaluation.
        loss: in nats, per token where there are tokens.
    """

    step: float
    tokens: float
    seconds: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class History:
    """How one run went.

    Attributes:
        name: its folder, or the name of its files in a comparison.
        seed: of weights and order of the data.
        training: each step with a finite loss.
        held_out: at evaluations with a finite loss.
        value: of the study's metric at the end; infinite where the run has diverged, None where
            the run was never evaluated.
        diverged: why, and at which step; None where it has not.
        trust_ratios: of the layers by their names, for each step that has some.
        sharpness: which a comparison has measured at the end; None where it has not.
    """

    name: str
    seed: int
    training: Sequence[Point]
    held_out: Sequence[Point]
    value: float | None
    diverged: str | None
    trust_ratios: Mapping[int, Mapping[str, float]]
    sharpness: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A setting of an optimizer, trained with one or several seeds.

    Attributes:
        optimizer: which has one colour on the whole page.
        label: unlike those of the study's other results.
        batch_size: sequences, or other examples, of a step.
        steps: of a whole run of a comparison; None for runs of the main job.
        params: settings of the optimizer.
        mean: of the metric over the seeds; infinite where one has diverged.
        interval: half the width of the mean's 95 % interval, Student's t; None for one seed.
        deviation: standard deviation over the seeds; None for one seed.
        histories: one for each seed.
        notes: what a reader must know of the result.
    """

    optimizer: str
    label: str
    batch_size: int
    steps: int | None
    params: Mapping[str, Any]
    mean: float
    interval: float | None
    deviation: float | None
    histories: Sequence[History]
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run by which a setting was chosen, or might be.

    Attributes:
        optimizer: as in the results.
        lr: the highest learning rate.
        params: settings of the optimizer.
        loss: of validation or held-out data, as a point's; infinite where the run has diverged.
        diverged: why, and at which step; None where it has not.
        chosen: whether the final runs have its setting.
    """

    optimizer: str
    lr: float
    params: Mapping[str, Any]
    loss: float
    diverged: str | None
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Study:
    """Results that stand beside each other: those of a comparison, or of all runs.

    Attributes:
        title: of its part of the page.
        metric: by which the results are ordered, such as "test perplexity"; less is better.
        unit: what a batch is made of in the end: "tokens", or "examples" such as images.
        validation: data of the trials' losses: "validation" or "held-out".
        optimizers: in the order of their colours.
        results: the best first.
        trials: in the order of their runs.
        notes: what makes the results hard to compare.
        settings: of each folder, by its name: all that was written about it.
    """

    title: str
    metric: str
    unit: str
    validation: str
    optimizers: Sequence[str]
    results: Sequence[Result]
    trials: Sequence[Trial]
    notes: Sequence[str]
    settings: Mapping[str, Mapping[str, Any]]


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """Read output folders of ``alto_ds.compare`` and of ``alto_ds.pretrain``.

    Args:
        folders: comparisons become a study each; runs become one, which is the last.

    Raises:
        ValueError: a folder is neither, it is not finished or broken, or it is there twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"{' '.join(map(str, folders))} names a folder twice; leave it out once")
    comparisons = [folder for folder in folders if (folder / SPEC).is_file()]
    runs = [folder for folder in folders if folder not in comparisons]
    for folder in runs:
        if not (folder / FILE).is_file():
            raise ValueError(
                f"{folder} is no output folder of alto_ds.compare, which has {SPEC}, nor of "
                f"alto_ds.pretrain, which has {FILE}"
            )
    studies = [_read(_comparison, folder) for folder in comparisons]
    return [*studies, _of_runs([_read(_run, folder) for folder in runs])] if runs else studies


def _read(reader: Callable[[Path], Kind], folder: Path) -> Kind:
    try:
        return reader(folder)
    except KeyError as error:
        raise ValueError(f"{folder}: a file has no {error}; another version wrote it") from None
    except (ValueError, TypeError, AttributeError, csv.Error, OSError) as error:
        raise ValueError(f"{folder}: {error}") from None


def _comparison(folder: Path) -> Study:
    spec = _object(folder / SPEC)
    if not (folder / "table.csv").is_file():
        raise ValueError("there is no table.csv: the comparison has not ended; its command goes on")
    runs = _rows(folder / "runs.csv")
    rows = _rows(folder / "table.csv")
    if not (rows and runs):
        raise ValueError("table.csv or runs.csv is empty; its command writes them again")
    metric = next(name for name in rows[0] if name.startswith("test_"))
    results = [_result(folder, row, runs, metric, spec["batch_size"]) for row in rows]
    chosen = {result.label: result.params for result in results}
    return Study(
        title=folder.resolve().name,
        metric=metric.replace("_", " "),
        unit="tokens" if spec["task"]["type"] == "text" else "examples",
        validation="validation",
        optimizers=[*spec["optimizers"]],
        results=results,
        trials=[_trial(run, chosen) for run in runs if run["stage"] == "search"],
        notes=[],
        settings={str(folder): spec},
    )


def _trial(run: Mapping[str, str], chosen: Mapping[str, Mapping[str, Any]]) -> Trial:
    params = json.loads(run["params"])
    return Trial(
        optimizer=run["optimizer"],
        lr=params["lr"],
        params=params,
        loss=float(run["validation_loss"]),
        diverged=run["why"] or None,
        chosen=chosen[run["optimizer"]] == params,
    )


def _result(
    folder: Path,
    row: Mapping[str, str],
    runs: Sequence[Mapping[str, str]],
    metric: str,
    batch_size: int,
) -> Result:
    name = row["optimizer"]
    finals = [run for run in runs if run["optimizer"] == name and run["stage"] == "final"]
    return Result(
        optimizer=name,
        label=name,
        batch_size=batch_size,
        steps=max(int(run["steps"]) for run in runs),  # others have diverged
        params=json.loads(row["params"]),
        mean=float(row[metric]),
        interval=_number(row["interval_95"]),
        deviation=_number(row["standard_deviation"]),
        histories=[
            History(
                name=run["run"],
                seed=int(run["seed"]),
                training=[
                    Point(**{key: float(value) for key, value in point.items()})
                    for point in _rows(curve_file(folder, run["run"]))
                ],
                held_out=[],
                value=float(run[metric]),
                diverged=run["why"] or None,
                # Those of other seeds look alike.
                trust_ratios=_ratios(folder, run["run"]) if run is finals[0] else {},
                sharpness=_number(run.get("sharpness", "")),
            )
            for run in finals
        ],
        notes=[row["edges"]] if row["edges"] else [],
    )


def _ratios(folder: Path, key: str) -> dict[int, dict[str, float]]:
    """None of optimizers without trust ratios, or of runs that an earlier version has done."""
    path = ratios_file(folder, key)
    found: dict[int, dict[str, float]] = {}
    for row in _rows(path) if path.exists() else []:
        found.setdefault(int(row["step"]), {})[row["layer"]] = float(row["ratio"])
    return found


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run of the main job.

    Attributes:
        folder: of the run.
        identity: what its ``run.json`` says, and "versions" of what has trained it.
        optimizer: its type, of E the base, too.
        setting: all that is the same for runs that differ by seed.
        lr: the highest learning rate so far; of a diverged run at least the one that was set.
        history: how it went.
        notes: what could not be read.
    """

    folder: Path
    identity: Mapping[str, Any]
    optimizer: str
    setting: str
    lr: float
    history: History
    notes: Sequence[str]


def _run(folder: Path) -> _Run:
    identity = _object(folder / FILE)
    optimizer = identity["optimizer"]
    base = optimizer["params"].get("optimizer")
    rows = read_metrics(folder / METRICS)
    end = _object(folder / DIVERGED) if (folder / DIVERGED).is_file() else None
    if not (rows or end):
        raise ValueError(f"{METRICS} has no step, so there is nothing to show yet")
    lost = sum(map(bool, (folder / METRICS).read_bytes().split(b"\n"))) - len(rows)
    setting = {key: value for key, value in identity.items() if key not in OF_SEEDS}
    if (folder / VERSIONS).is_file():
        identity["versions"] = _object(folder / VERSIONS)
    rates = [row["lr"] for row in rows]
    if end and "lr" in optimizer["params"]:
        rates.append(optimizer["params"]["lr"])  # which it may not have reached
    return _Run(
        folder=folder,
        identity=identity,
        optimizer=f"{optimizer['type']} over {base}" if base else optimizer["type"],
        setting=json.dumps(setting, sort_keys=True),
        lr=max(rates, default=0.0),
        history=_history(str(folder), identity["seed"], rows, end),
        notes=[f"{lost} lines of {folder / METRICS} cannot be read: left out."] if lost else [],
    )


def _history(
    name: str, seed: int, rows: Sequence[Mapping[str, Any]], end: Mapping[str, Any] | None
) -> History:
    training: list[Point] = []
    held_out: list[Point] = []
    diverged, value = None, None
    seconds, tokens = 0.0, 0
    for row in rows:
        seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
        tokens = row["tokens"]
        here = {"step": row["step"], "tokens": tokens, "seconds": seconds}
        training.append(Point(**here, loss=row["loss"]))
        if "val_loss" in row:
            value, loss = row["val_ppl"], row["val_loss"]
            finite = math.isfinite(loss)
            diverged = None if finite else f"step {row['step']}: held-out loss {loss}"
            held_out += [Point(**here, loss=loss)] if finite else []
    if end is not None:
        value, diverged = math.inf, _why(end)
    return History(
        name=name,
        seed=seed,
        training=training,
        held_out=held_out,
        value=value,
        diverged=diverged,
        trust_ratios={row["step"]: row["trust_ratios"] for row in rows if row.get("trust_ratios")},
    )


def _why(end: Mapping[str, Any]) -> str:
    """Such as "step 5: the loss is nan", of what the main job says when it ends."""
    step, first = f"step {end['step']}: ", end["why"].split(". ")[0].rstrip(".")
    return step + (first.partition(step)[2] or first)  # which mostly names the step itself


def _of_runs(runs: Sequence[_Run]) -> Study:
    settings: dict[str, list[_Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    names = [group[0].optimizer for group in settings.values()]
    results = []
    for group in settings.values():
        _check_seeds(group)
        name = group[0].optimizer
        label = name if names.count(name) == 1 else f"{name}, {group[0].folder.resolve().name}"
        results.append(_summary(group, label))
    trials = [
        Trial(
            optimizer=run.optimizer,
            lr=run.lr,
            params=run.identity["optimizer"]["params"],
            loss=math.inf if run.history.diverged else run.history.held_out[-1].loss,
            diverged=run.history.diverged,
            chosen=False,
        )
        for run in runs
        if run.history.value is not None and run.lr > 0
    ]
    free = (*OF_SEEDS, *COMPARED)
    differ = differences([{k: v for k, v in run.identity.items() if k not in free} for run in runs])
    notes = [note for run in runs for note in run.notes]
    if differ:
        notes.append(f"The runs differ in more than the optimizer: {', '.join(differ)}.")
    return Study(
        title="Runs",
        metric="held-out perplexity",
        unit="tokens",
        validation="held-out",
        optimizers=[*dict.fromkeys(names)],
        results=sorted(results, key=lambda result: result.mean),
        trials=trials,
        notes=notes,
        settings={str(run.folder): run.identity for run in runs},
    )


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same everywhere."""
    names = dict.fromkeys(name for some in settings for name in some)
    return [name for name in names if len({json.dumps(some.get(name)) for some in settings}) > 1]


def _summary(runs: Sequence[_Run], label: str) -> Result:
    """Of runs that differ by seed."""
    histories = [run.history for run in runs]
    values = [math.nan if history.value is None else history.value for history in histories]
    return Result(
        optimizer=runs[0].optimizer,
        label=label,
        batch_size=runs[0].identity["train_batch_size"],
        steps=None,
        params=runs[0].identity["optimizer"]["params"],
        **over(values)._asdict(),
        histories=histories,
        notes=[note for run in runs for note in _how_far(run)],
    )


def _how_far(run: _Run) -> list[str]:
    history = run.history
    if history.diverged is not None:
        return []  # which the number of diverged seeds says
    last = history.training[-1].step
    planned = run.identity.get("scheduler", {}).get("params", {}).get("total_num_steps", last)
    if not history.held_out:
        return [f"{run.folder.name} has not been evaluated"]
    if history.held_out[-1].step < planned:
        evaluated = history.held_out[-1].step
        return [f"{run.folder.name} at step {evaluated:g} of {planned}, its last evaluation"]
    return []


def _check_seeds(runs: Sequence[_Run]) -> None:
    by_seed: dict[int, Path] = {}
    for run in runs:
        other = by_seed.setdefault(run.history.seed, run.folder)
        if other != run.folder:
            raise ValueError(
                f"{other} and {run.folder} have the same settings and seed={run.history.seed}, but "
                "intervals are over seeds; leave one of them out"
            )


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path.name} has a row that is cut off or too long")
    return rows


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
