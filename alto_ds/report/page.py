"""The page: what it says, and in which order."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from alto_ds.compare.tables import over
from alto_ds.files import replace_text
from alto_ds.report import pictures
from alto_ds.report.pictures import Look, Picture
from alto_ds.report.reading import OF_SEEDS, History, Result, Study, differences
from alto_ds.report.sharpness import DIRECTIONS, Sharpness

TEMPLATE = "page.html"
PAGE = "index.html"
EDGES = (
    " A note names a setting whose best value is at an end of what was searched: a better one may "
    "lie beyond."
)
SHARPNESS = (
    " Sharpness is the largest eigenvalue of the Hessian of the training loss at the end, over the "
    "first examples of each seed."
)
# Settings, of comparisons and of runs, that may differ where batch sizes are compared.
OF_BATCHES = (
    *("optimizers", "batch_size", "micro_batch_size", "workers", "search", "seeds", "machine"),
    "sharpness",
    *("optimizer", "scheduler", "train_batch_size", *OF_SEEDS),
)
LENGTHS = ("steps", "tokens", "epochs")  # settings, of which one says how long a run is
BY = {"batch_size": "batch size", "steps": "number of steps"}
VERSIONS = ("alto-ds", "deepspeed", "matplotlib", "torch", "transformers")


class Table(NamedTuple):
    """Attributes: its heading, and its rows of as many cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Part(NamedTuple):
    """A part of the page.

    Attributes:
        title: above it.
        words: sentences under the title.
        table: which is read first; None for none.
        pictures: beside each other where there is room.
        after: what must be known to read the pictures.
        folded: tables that are shown when asked for, by their titles.
    """

    title: str
    words: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    after: Sequence[str] = ()
    folded: Mapping[str, Table] = {}


def write_page(studies: Sequence[Study], sharpness: Mapping[str, Sharpness], folder: Path) -> Path:
    """Write the page, and its pictures as PNG beside it.

    Args:
        studies: from :func:`alto_ds.report.reading.read_studies`.
        sharpness: of runs by their folders' names; those of their histories.
        folder: which is made.

    Returns:
        The page's path. It is one file that loads nothing else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    look = pictures.looks(studies)
    with pictures.styled():
        parts = [
            part
            for number, study in enumerate(studies, start=1)
            for part in _of_study(
                study, f"{study.title}: " if len(studies) > 1 else "", number, look, folder
            )
        ]
        parts += _scaling(studies, look, folder)
        parts += _trust_ratios(studies, folder)
        parts += _sharpness(studies, sharpness, look, folder)
    parts.append(_settings(studies))
    loader = jinja2.PackageLoader("alto_ds.report", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    title = ", ".join(study.title for study in studies)
    page = folder / PAGE
    replace_text(page, environment.get_template(TEMPLATE).render(title=title, parts=parts))
    return page


def _of_study(
    study: Study, prefix: str, number: int, look: Mapping[str, Look], folder: Path
) -> Iterator[Part]:
    results = pictures.finished(
        pictures.draw_results(study, look),
        folder,
        f"results{number}",
        f"{study.metric} of each optimizer, over the seeds",
    )
    yield Part(
        title=_title(prefix, study.metric),
        words=[*_headline(study), *study.notes],
        table=_results_table(study),
        pictures=[results],
        after=[
            "Strokes are seeds, the marker is their mean, and the line its 95 % interval by "
            "Student's t over the seeds. A diverged run counts as infinitely bad."
            + (EDGES if study.validation == "validation" else "")
            + (SHARPNESS if any(map(_sharpness_of, study.results)) else "")
        ],
        folded={"Each final run": _runs_table(study)},
    )
    histories = [history for result in study.results for history in result.histories]
    axes = {
        "tokens": study.unit,
        "step": "steps",
        "seconds": "seconds of training",
    }
    longest = max(pictures.window(history.training) for history in histories)
    mean = f", the mean of up to {longest} steps" if longest > 1 else ""
    yield Part(
        title=_title(prefix, "loss while training"),
        pictures=[
            pictures.finished(
                pictures.draw_curves(study, against, unit, look),
                folder,
                f"loss{number}_{against}",
                f"training loss against {unit}",
            )
            for against, unit in axes.items()
        ],
        after=[
            f"A line for each seed: its training loss{mean}. "
            + ("Open markers are held-out loss. " if any(h.held_out for h in histories) else "")
            + "× is where a run has diverged. Evaluation is not part of the seconds."
        ],
    )
    yield from _trials(study, prefix, number, look, folder)


def _title(prefix: str, words: str) -> str:
    return f"{prefix}{words}" if prefix else words[0].upper() + words[1:]


def _headline(study: Study) -> list[str]:
    best = study.results[0]
    if not math.isfinite(best.mean):
        return []
    return [f"Lowest mean: {best.label}, {_mean(best)}."]


def _mean(result: Result) -> str:
    if any(history.diverged is not None for history in result.histories):
        return "diverged"
    if not math.isfinite(result.mean):
        return "not known"
    half = "" if result.interval is None else f" ± {result.interval:.2f}"
    return f"{result.mean:.2f}{half}"


def _results_table(study: Study) -> Table:
    head = [
        *("optimizer", f"{study.metric} (95 %)", "deviation", "range"),
        *("seeds (diverged)", "trials (diverged)", "sharpness (95 %)", "batch size", "setting"),
        "note",
    ]
    rows = []
    for result in study.results:
        values = [h.value for h in result.histories if h.value is not None]
        trials = [trial for trial in study.trials if trial.optimizer == result.optimizer]
        diverged = sum(history.diverged is not None for history in result.histories)
        bad = sum(trial.diverged is not None for trial in trials)
        rows.append(
            [
                result.label,
                _mean(result),
                "" if result.deviation is None else f"{result.deviation:.3f}",
                _range(values) if len(values) > 1 else "",
                f"{len(result.histories)} ({diverged})",
                f"{len(trials)} ({bad})" if study.validation == "validation" else "",
                _sharpness_of(result),
                f"{result.batch_size:,}",
                _params(result.params),
                "; ".join(result.notes),
            ]
        )
    return _without_empty(Table(head, rows))


def _sharpness_of(result: Result) -> str:
    """Mean and interval over the seeds; empty where one has none."""
    values = [history.sharpness for history in result.histories if history.sharpness is not None]
    if len(values) < len(result.histories):
        return ""
    mean, half, _ = over(values)
    return f"{mean:.4g}" + ("" if half is None else f" ± {half:.2g}")


def _range(values: Sequence[float]) -> str:
    highest = max(values)
    return f"{min(values):.2f} to " + (f"{highest:.2f}" if math.isfinite(highest) else "diverged")


def _runs_table(study: Study) -> Table:
    head = ("optimizer", "seed", study.metric, "steps", study.unit, "seconds", "end", "run")
    rows = [
        [result.label, str(history.seed), _value(history), *_ends(history), history.name]
        for result in study.results
        for history in result.histories
    ]
    return Table(head, rows)


def _value(history: History) -> str:
    return "" if history.value is None else f"{history.value:.4f}"


def _ends(history: History) -> list[str]:
    end = "finite" if history.diverged is None else f"diverged at {history.diverged}"
    if not history.training:
        return ["0", "0", "0", end]
    last = history.training[-1]
    return [f"{last.step:,.0f}", f"{last.tokens:,.0f}", f"{last.seconds:,.1f}", end]


def _trials(
    study: Study, prefix: str, number: int, look: Mapping[str, Look], folder: Path
) -> Iterator[Part]:
    rates = {
        name: {trial.lr for trial in study.trials if trial.optimizer == name}
        for name in study.optimizers
    }
    shown = [name for name, found in rates.items() if len(found) > 1]
    if not shown:
        return
    losses = [trial.loss for trial in study.trials if math.isfinite(trial.loss)]
    first = [h.training[0].loss for r in study.results for h in r.histories if h.training]
    low = min(losses, default=0.0)
    bounds = low, max([low + 1e-3, min(max(losses, default=1.0), max(first, default=math.inf))])
    head = ("optimizer", "setting", f"{study.validation} loss", "end")
    rows = [
        [
            trial.optimizer,
            _params(trial.params),
            f"{trial.loss:.4f}",
            "finite" if trial.diverged is None else f"diverged at {trial.diverged}",
        ]
        for trial in study.trials
    ]
    chosen = any(trial.chosen for trial in study.trials)
    yield Part(
        title=_title(prefix, "learning rate"),
        pictures=[
            pictures.finished(
                pictures.draw_trials(study.trials, name, look[name], bounds),
                folder,
                f"rates{number}_{place}",
                f"{study.validation} loss of {name} against the learning rate",
            )
            for place, name in enumerate(shown, start=1)
        ],
        after=[
            f"The {study.validation} loss of each trial, at its highest learning rate. × has "
            "diverged; a triangle at the upper edge is worse than untrained weights."
            + (" The circle is the trial whose setting the final runs have." if chosen else "")
        ],
        folded={"Each trial": Table(head, rows)},
    )


def _scaling(studies: Sequence[Study], look: Mapping[str, Look], folder: Path) -> Iterator[Part]:
    """Results by batch size, and those of each batch size by the number of steps."""
    for number, metric in enumerate(dict.fromkeys(study.metric for study in studies), start=1):
        alike = [study for study in studies if study.metric == metric]
        yield from _by("batch_size", alike, look, folder, f"batch_size{number}", "")
        for size in sorted({result.batch_size for study in alike for result in study.results}):
            same = [study for study in alike if study.results[0].batch_size == size]
            where = f", batch size {size:,}"
            yield from _by("steps", same, look, folder, f"steps{number}_{size}", where)


def _by(
    of: str,
    studies: Sequence[Study],
    look: Mapping[str, Look],
    folder: Path,
    name: str,
    where: str,
) -> Iterator[Part]:
    """A part, where there is an optimizer with results for several values.

    Args:
        of: whose values: see :func:`alto_ds.report.pictures.best_by`.
        studies: of one metric.
        look: of each optimizer.
        folder: for the picture.
        name: of the picture.
        where: end of the title.
    """
    found = pictures.best_by(studies, of)
    if not found:
        return
    metric, words = studies[0].metric, BY[of]
    rows = [
        [
            *(optimizer, f"{result.batch_size:,}"),
            "" if result.steps is None else f"{result.steps:,}",
            *(_mean(result), _params(result.params)),
        ]
        for optimizer, results in found.items()
        for result in results.values()
    ]
    head = ("optimizer", "batch size", "steps", metric, "setting")
    yield Part(
        title=f"{_title('', metric)} by {words}{where}",
        words=[f"The best result of each optimizer at each {words}.", *_unlike(studies, of)],
        table=_without_empty(Table(head, rows)),
        pictures=[
            pictures.finished(
                pictures.draw_scaling(studies, of, look),
                folder,
                name,
                f"{metric} of each optimizer against the {words}{where}",
            )
        ],
        after=["Lines at a point are 95 % intervals. × has diverged."],
    )


def _unlike(studies: Sequence[Study], of: str) -> list[str]:
    """What a reader must know before results of several batch sizes or lengths are compared."""
    free = {*OF_BATCHES, *(LENGTHS if of == "steps" or _equal_budget(studies) else ())}
    settings = [settings for study in studies for settings in study.settings.values()]
    rest = [{k: v for k, v in some.items() if k not in free} for some in settings]
    differ = differences([dict(_flat(some)) for some in rest])
    return [f"The {BY[of]} is not all that differs: {', '.join(differ)}."] if differ else []


def _equal_budget(studies: Sequence[Study]) -> bool:
    """Whether all comparisons train on as many examples, rounded to whole steps."""
    results = [result for study in studies for result in study.results]
    found = [result.steps * result.batch_size for result in results if result.steps is not None]
    largest = max(result.batch_size for result in results)
    return max(found, default=0) - min(found, default=0) < largest


def _trust_ratios(studies: Sequence[Study], folder: Path) -> Iterator[Part]:
    several = len(studies) > 1
    found = [
        (f"{study.title}: " * several + f"{result.label}, seed {history.seed}", history)
        for study in studies
        for result in study.results
        for history in result.histories
        if history.trust_ratios
    ]
    if found:
        yield Part(
            title="Trust ratios of the layers",
            words=[
                "‖weights‖ / ‖update‖ by which a layer's update was scaled: at evaluations, of a "
                "comparison at some steps of each optimizer's first final run."
            ],
            pictures=[
                pictures.finished(
                    pictures.draw_trust_ratios(title, history.trust_ratios),
                    folder,
                    f"trust_ratios{number}",
                    f"trust ratios of the layers over steps: {title}",
                )
                for number, (title, history) in enumerate(found, start=1)
            ],
        )


def _sharpness(
    studies: Sequence[Study],
    found: Mapping[str, Sharpness],
    look: Mapping[str, Look],
    folder: Path,
) -> Iterator[Part]:
    if not found:
        return
    lines = {
        history.name: (result.optimizer, pictures.result_looks(study, look)[result.label])
        for study in studies
        for result in study.results
        for history in result.histories
    }
    head = ("run", "largest eigenvalue", "residual", "products", "loss", "sequences", "model")
    rows = [
        [
            f"{lines[name][0]}, {name}",
            f"{sharpness.eigenvalue.value:.4g}",
            f"{sharpness.eigenvalue.residual:.2g}",
            str(sharpness.eigenvalue.products),
            f"{sharpness.loss:.4f}",
            str(sharpness.sequences),
            sharpness.source,
        ]
        for name, sharpness in found.items()
    ]
    drawn = [(Path(name).name, lines[name][1], sharpness) for name, sharpness in found.items()]
    yield Part(
        title="Sharpness of the end point",
        words=[
            "The largest eigenvalue of the Hessian of the mean loss over held-out sequences, by "
            "power iteration with Hessian-vector products. The Hessian has an eigenvalue that is "
            "at most the residual away from it."
        ],
        table=Table(head, rows),
        pictures=[
            pictures.finished(
                pictures.draw_directions(drawn),
                folder,
                "sharpness",
                "held-out loss along random directions from the end point",
            )
        ],
        after=[
            f"The mean loss along {DIRECTIONS} random directions and, shaded, their range. At "
            "distance 1 each filter has moved by its own norm; biases and norms stay (Li et al., "
            "2018). The directions are the same for runs of the same model."
        ],
    )


def _settings(studies: Sequence[Study]) -> Part:
    here = {name: metadata.version(name) for name in VERSIONS} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    return Part(
        title="Settings and versions",
        words=["Page made by " + ", ".join(f"{name} {of}" for name, of in here.items()) + "."],
        folded={
            name: Table(("setting", "value"), [*_flat(settings)])
            for study in studies
            for name, settings in study.settings.items()
        },
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)


def _params(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in params.items())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_shown, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _without_empty(table: Table) -> Table:
    """Without columns that have nothing in any row."""
    kept = [place for place in range(len(table.head)) if any(row[place] for row in table.rows)]
    return Table(
        [table.head[place] for place in kept],
        [[row[place] for place in kept] for row in table.rows],
    )
