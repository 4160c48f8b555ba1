"""The pictures of the page, by matplotlib.

An optimizer has one colour in all of them, from Okabe and Ito's palette, which colour-blind readers
tell apart; where there are more optimizers than colours, dashes and markers differ.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.markers import CARETUP
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from alto_ds.report.reading import Point, Result, Study, Trial
from alto_ds.report.sharpness import Sharpness

# In the page they are the reader's own: see STYLES.
INK, QUIET, PAPER = "#1a1d21", "#8a9099", "#fefefe"
STYLES = {INK: "var(--ink)", QUIET: "var(--quiet)", PAPER: "var(--paper)"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
MARKERS = ("o", "s", "^")
POINTS = 200  # of a curve, at most
SMOOTHED = 50  # a curve's loss is a mean over this part of its steps

STYLE = {
    **{f"axes.{name}": INK for name in ("edgecolor", "labelcolor", "titlecolor")},
    **{"xtick.color": INK, "ytick.color": INK, "text.color": INK},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7},
    **{"font.size": 9, "axes.titlesize": 9, "font.family": "DejaVu Sans"},
    **{"svg.fonttype": "none", "svg.hashsalt": "alto_ds.report"},
    "text.parse_math": False,  # of a name with $
    **{"axes.grid": False, "grid.color": QUIET, "grid.alpha": 0.25, "grid.linewidth": 0.6},
}


def styled() -> AbstractContextManager[None]:
    """A context in which all pictures are drawn and written."""
    return matplotlib.rc_context(STYLE)


class Look(NamedTuple):
    """How an optimizer is drawn."""

    color: str
    dashes: Any
    marker: str


class Picture(NamedTuple):
    """A picture of the page.

    Attributes:
        name: of its PNG, without the ending.
        svg: to be part of a page that defines the variables of :data:`STYLES`.
        says: what it shows, for those who do not see it.
        width: that it needs to be read, in CSS pixels.
    """

    name: str
    svg: str
    says: str
    width: int


def looks(studies: Sequence[Study]) -> dict[str, Look]:
    """One look for each optimizer of the page."""
    names = dict.fromkeys(name for study in studies for name in study.optimizers)
    found = {}
    for number, name in enumerate(names):
        turn = number // len(COLOURS) % len(DASHES)
        found[name] = Look(COLOURS[number % len(COLOURS)], DASHES[turn], MARKERS[turn])
    return found


def result_looks(study: Study, look: Mapping[str, Look]) -> dict[str, Look]:
    """By the results' labels: of several results of an optimizer, dashes and markers differ."""
    found: dict[str, Look] = {}
    counts: dict[str, int] = {}
    for result in study.results:
        first = look[result.optimizer]
        number = counts.get(result.optimizer, 0)
        counts[result.optimizer] = number + 1
        turn = (DASHES.index(first.dashes) + number) % len(DASHES)
        found[result.label] = Look(first.color, DASHES[turn], MARKERS[turn])
    return found


def finished(figure: Figure, folder: Path, name: str, says: str) -> Picture:
    """Write a figure as PNG, and give it as a part of the page.

    Args:
        figure: which is closed.
        folder: for the PNG.
        name: of the file, without its ending.
        says: see :class:`Picture`.
    """
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor=PAPER)
    text = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=none)
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # No name may be there twice in the page.
    svg = re.sub(r'<g id="\w+">', "<g>", svg)
    # The page says how large it is, and which font it has.
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    svg = svg.replace("'DejaVu Sans'", "inherit")
    for colour, style in STYLES.items():
        svg = svg.replace(colour, style)
    return Picture(name, svg, says, round(figure.get_figwidth() * 96))


def draw_results(study: Study, look: Mapping[str, Look]) -> Figure:
    """A row for each result: seeds, their mean, and its 95 % interval."""
    rows = list(reversed(study.results))
    look = result_looks(study, look)
    figure, axis = pyplot.subplots(figsize=(4.6, 0.9 + 0.26 * len(rows)), layout="constrained")
    shown = []
    for y, result in enumerate(rows):
        values = [h.value for h in result.histories if h.value is not None]
        finite = [value for value in values if math.isfinite(value)]
        color, _, marker = look[result.label]
        axis.plot(finite, [y] * len(finite), "|", color=color, markersize=9, alpha=0.7)
        shown += finite
        if math.isfinite(result.mean):
            half = result.interval or 0.0
            axis.plot([result.mean - half, result.mean + half], [y, y], color=color, linewidth=1.6)
            axis.plot(result.mean, y, marker, color=color, markersize=6)
            shown += [max(result.mean - half, min(finite) / 4), result.mean + half]
        diverged = sum(history.diverged is not None for history in result.histories)
        if diverged:
            axis.plot(0.985, y, "x", color=color, transform=axis.get_yaxis_transform())
            words = f"{diverged} of {len(result.histories)} diverged"
            place = {"transform": axis.get_yaxis_transform(), "va": "center", "ha": "right"}
            axis.text(0.96, y, words, fontsize=8, **place)
    axis.set_yticks(range(len(rows)), [result.label for result in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.tick_params("y", length=0)
    axis.grid(axis="x", visible=True)
    axis.set_xlabel(study.metric)
    if shown:
        low, high = min(shown), max(shown)
        if high > 4 * low > 0:
            _log(axis, low, high)
        else:
            room = 0.04 * (high - low) + 1e-9
            axis.set_xlim(low - room, high + room)
    return figure


def draw_curves(study: Study, against: str, unit: str, look: Mapping[str, Look]) -> Figure:
    """The training loss of each seed, and the held-out loss where it was measured on the way.

    Args:
        study: of which.
        against: a name of :class:`~alto_ds.report.reading.Point`'s numbers, for the x axis.
        unit: label of that axis.
        look: of each optimizer.
    """
    figure, axis = pyplot.subplots(figsize=(4.1, 3.2), layout="constrained")
    ends, crosses, lowest, highest = [], [], [], []
    look = result_looks(study, look)
    for result in study.results:
        color, dashes, marker = look[result.label]
        last = []
        for history in result.histories:
            if not history.training:  # diverged in its first step
                continue
            x, y = _smoothed(history.training, against)
            axis.plot(x, y, color=color, linestyle=dashes, linewidth=1.1, alpha=0.85)
            lowest.append(min(y))
            highest.append(history.training[0].loss)
            points = history.held_out
            held_out = [getattr(point, against) for point in points], [p.loss for p in points]
            axis.plot(*held_out, marker, color=color, markersize=3, markerfacecolor=PAPER)
            last.append((x[-1], y[-1]))
            if history.diverged is not None:
                crosses.append((x[-1], y[-1], color))
        if last:
            ends.append((*max(last), result.label, look[result.label]))
    per = " per token" if study.unit == "tokens" else ""
    axis.set(xlabel=unit, ylabel=f"loss (nats{per})")
    axis.grid(axis="y", visible=True)
    if ends:
        bottom, top = min(lowest), max(highest)
        room = 0.04 * (top - bottom) + 1e-9
        axis.set_ylim(bottom - room, top + room)
        for at, loss, color in crosses:
            axis.plot(at, min(loss, top), "x", color=color, markersize=6)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(FuncFormatter(_short))
        axis.set_xlim(0, max(x for x, *_ in ends))
        _label_ends(axis, ends)
    return figure


def draw_trials(
    trials: Sequence[Trial], optimizer: str, look: Look, bounds: tuple[float, float]
) -> Figure:
    """The loss of an optimizer's trials over their learning rates.

    Args:
        trials: of all optimizers.
        optimizer: which one.
        look: of it.
        bounds: of the loss; trials above are at the upper edge.
    """
    figure, axis = pyplot.subplots(figsize=(2.1, 2.0), layout="constrained")
    mine = [trial for trial in trials if trial.optimizer == optimizer]
    low, high = bounds
    for trial in mine:
        above = CARETUP if trial.loss > high else look.marker
        marker = above if trial.diverged is None else "x"
        y = min(trial.loss, high)
        axis.plot(trial.lr, y, marker=marker, color=look.color, markersize=5, clip_on=False)
        if trial.chosen:
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": INK}
            axis.plot(trial.lr, y, "o", markeredgewidth=0.8, clip_on=False, **ring)
    axis.set(title=optimizer, xlabel="learning rate", ylabel="loss (nats)")
    rates = [trial.lr for trial in mine]
    _log(axis, min(rates), max(rates))
    axis.set_ylim(low - 0.06 * (high - low), high)
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.grid(axis="y", visible=True)
    return figure


def draw_scaling(studies: Sequence[Study], of: str, look: Mapping[str, Look]) -> Figure:
    """The best result of each optimizer for each batch size, or number of steps.

    Args:
        studies: of one metric.
        of: see :func:`best_by`.
        look: of each optimizer.
    """
    figure, axis = pyplot.subplots(figsize=(4.6, 3.3), layout="constrained")
    ends = []
    found = best_by(studies, of)
    for optimizer, best in found.items():
        color, dashes, marker = look[optimizer]
        x = [size for size, result in best.items() if math.isfinite(result.mean)]
        y = [best[size].mean for size in x]
        error = [best[size].interval or 0.0 for size in x]
        style = {"color": color, "linestyle": dashes, "marker": marker}
        axis.errorbar(x, y, error, **style, markersize=5, linewidth=1.2, capsize=3)
        ends += [(x[-1], y[-1], optimizer, look[optimizer])] if x else []
        for size in best.keys() - {*x}:
            axis.plot(size, 0.97, "x", color=color, transform=axis.get_xaxis_transform())
    sizes = sorted({size for best in found.values() for size in best})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_formatter(NullFormatter())
    examples = "sequences" if studies[0].unit == "tokens" else "examples"
    label = f"batch size ({examples})" if of == "batch_size" else of
    axis.set(xlabel=label, ylabel=studies[0].metric)
    axis.grid(axis="y", visible=True)
    if ends:
        _label_ends(axis, ends)
    return figure


def best_by(studies: Sequence[Study], of: str) -> dict[str, dict[int, Result]]:
    """The best result for each value, smallest first, of optimizers that have several values.

    Args:
        studies: of one metric.
        of: whose values: ``batch_size`` or ``steps`` of :class:`~alto_ds.report.reading.Result`.
    """
    found: dict[str, dict[int, Result]] = {}
    for result in (result for study in studies for result in study.results):
        sizes, size = found.setdefault(result.optimizer, {}), getattr(result, of)
        if size is None:
            continue
        other = sizes.get(size)
        if other is None or result.mean < other.mean:
            sizes[size] = result
    return {name: dict(sorted(sizes.items())) for name, sizes in found.items() if len(sizes) > 1}


def draw_trust_ratios(title: str, by_step: Mapping[int, Mapping[str, float]]) -> Figure:
    """A row for each layer, the first on top, and a column for each step; colours are ratios."""
    layers = list(dict.fromkeys(name for ratios in by_step.values() for name in ratios))
    table = np.array([[r.get(name, math.nan) for r in by_step.values()] for name in layers])
    table[~((table > 0) & np.isfinite(table))] = math.nan  # they have no colour, and stay empty
    height = min(max(1.1 + 0.17 * len(layers), 2.4), 13)
    figure, axis = pyplot.subplots(figsize=(7.2, height), layout="constrained")
    norm = LogNorm() if np.isfinite(table).any() else None
    image = axis.imshow(table, aspect="auto", interpolation="none", norm=norm, cmap="cividis")
    columns = range(0, len(by_step), -(-len(by_step) // 8))
    axis.set_xticks(columns, [f"{list(by_step)[column]:,}" for column in columns])
    rows = range(0, len(layers), -(-len(layers) // 70))
    short = [re.sub(r"^transformer\.|\.weight$", "", name) for name in layers]
    axis.set_yticks(rows, [short[row] for row in rows], fontsize=8)
    axis.set(title=title, xlabel="step")
    bar = figure.colorbar(image, aspect=40, pad=0.02)
    bar.set_label("trust ratio")
    if norm is not None:
        _few_ticks(bar.ax.yaxis, [1.0, 2.0, 5.0])
    return figure


def draw_directions(runs: Sequence[tuple[str, Look, Sharpness]]) -> Figure:
    """The loss along random directions: the mean of each run's directions, and their range."""
    figure, axis = pyplot.subplots(figsize=(4.6, 3.3), layout="constrained")
    ends = []
    for name, look, sharpness in runs:
        losses, x = np.array(sharpness.losses), sharpness.distances
        mean = losses.mean(axis=0)
        low, high = losses.min(axis=0), losses.max(axis=0)
        axis.fill_between(x, low, high, color=look.color, alpha=0.2, linewidth=0)
        axis.plot(x, mean, color=look.color, linestyle=look.dashes, linewidth=1.4)
        ends.append((x[-1], mean[-1], name, look))
    axis.set(xlabel="distance (norms of the filters)", ylabel="held-out loss (nats per token)")
    axis.grid(axis="y", visible=True)
    _label_ends(axis, ends)
    return figure


def window(points: Sequence[Point]) -> int:
    """Steps over which a curve's loss is a mean."""
    return max(len(points) // SMOOTHED, 1)


def _smoothed(points: Sequence[Point], against: str) -> tuple[list[float], list[float]]:
    """Some of the points, each with the mean loss of the steps up to it."""
    count = window(points)
    sums = np.concatenate([[0.0], np.cumsum([point.loss for point in points])])
    ends = np.arange(1, len(points) + 1)
    starts = np.maximum(ends - count, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    kept = np.unique(np.linspace(0, len(points) - 1, POINTS).astype(int))
    return [getattr(points[place], against) for place in kept], means[kept].tolist()


def _label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, Look]]) -> None:
    """Write the lines' names to the right of the axes, in the order of their ends.

    Args:
        axis: with all that is drawn in it; its limits are final then.
        ends: x and y of a line's end, its name and look.
    """
    axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())  # they are computed when asked for
    to_axes = axis.transData + axis.transAxes.inverted()
    height = axis.bbox.height * 72 / axis.figure.dpi  # points
    step = min(11 / height, 1 / len(ends))
    order = sorted(ends, key=lambda end: end[1])
    places = [tuple(to_axes.transform((x, y))) for x, y, *_ in order]
    heights = spread([y for _, y in places], step)
    outside: dict[str, Any] = {"transform": axis.transAxes, "clip_on": False}
    for (x, y), place, (*_, name, look) in zip(places, heights, order, strict=True):
        if x > 0.98:  # elsewhere it would look like data
            axis.plot([1.01, 1.06], [y, place], color=QUIET, linewidth=0.5, **outside)
        style = {"color": look.color, "linestyle": look.dashes, "linewidth": 1.6}
        axis.plot([1.07, 1.13], [place, place], **style, **outside)
        size = 8 if step * height > 9 else 6.5
        axis.text(1.15, place, name, va="center", fontsize=size, **outside)


def spread(places: Sequence[float], step: float) -> list[float]:
    """Sorted places, moved so that neighbours are at least a step apart, within 0 and 1."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + step if found else 0.0))
    for number in range(len(found) - 1, -1, -1):
        above = found[number + 1] - step if number + 1 < len(found) else 1.0
        found[number] = min(found[number], above)
    return found


def _log(axis: Axes, low: float, high: float) -> None:
    """Make the x axis logarithmic, with room at both ends."""
    room = max((high / low) ** 0.06, 1.1)
    axis.set_xscale("log")
    axis.set_xlim(low / room, high * room)
    ratio = high / low
    _few_ticks(axis.xaxis, [1.0] if ratio > 30 else [1.0, 3.0] if ratio > 5 else [1.0, 2.0, 5.0])


def _few_ticks(scale: XAxis | YAxis, digits: Sequence[float]) -> None:
    """On a logarithmic axis, at numbers with these first digits."""
    scale.set_major_locator(LogLocator(subs=digits, numticks=6))
    scale.set_major_formatter(FuncFormatter(_plain))
    scale.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    """Such as 0.01, 5000, 1e-5 and 1e12."""
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", f"{value:g}")


def _short(value: float, _: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
