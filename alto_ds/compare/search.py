"""Which settings does an optimizer try, and did the best lie at an edge?

What is proposed depends on the settings of the search and on the losses of earlier trials alone,
in the order of the trials: not on the optimizer's name, the number of workers, or which run ended
first. So a search that was killed proposes the same again.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from alto_ds.compare.spec import Entry, Range, SearchSettings

EDGE = 0.05  # of a range, from either end


class Search(Protocol):
    """Proposes settings, batch by batch."""

    def ask(self) -> list[dict[str, Any]]:
        """The next trials' values of the settings that are searched for; none at the end."""
        ...

    def tell(self, losses: Sequence[float]) -> None:
        """Validation losses of the trials asked for last, in their order; inf for diverged ones."""
        ...


def make_search(entry: Entry, settings: SearchSettings) -> Search:
    """The search for an optimizer's settings.

    Raises:
        ValueError: the number of trials is not that of the grid, or a range does not fit the
            method; it names the setting.
    """
    if settings.method == "grid":
        return Listed(_grid(entry, settings.trials))
    for name, values in entry.search.items():
        if isinstance(values, Range) and values.points is not None:
            raise ValueError(
                f"search.{name}.points={values.points} is for search.method=grid, not "
                f"{settings.method}; remove it"
            )
    if not entry.search and settings.trials > 1:
        raise ValueError(
            f"search has nothing to try, but search.trials={settings.trials}; give lr a range"
        )
    if settings.method == "random":
        return Listed([*_random(entry, settings)])
    return Optuna(entry, settings)


class Listed:
    """Trials that are all known at first. See :class:`Search`."""

    def __init__(self, trials: list[dict[str, Any]]) -> None:
        self._left = trials

    def ask(self) -> list[dict[str, Any]]:
        """See :meth:`Search.ask`."""
        asked, self._left = self._left, []
        return asked

    def tell(self, losses: Sequence[float]) -> None:
        """They change nothing."""


class Optuna:
    """Optuna's sampler TPE, a batch of trials at a time. See :class:`Search`.

    Nothing is stored: a search that was killed is repeated with the losses of the runs that are
    there, for Optuna's storage does not keep the sampler's random numbers.
    """

    def __init__(self, entry: Entry, settings: SearchSettings) -> None:
        import optuna  # which takes a second

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._left, self._batch = settings.trials, settings.batch
        self._space = {name: _distribution(values) for name, values in entry.search.items()}
        self._lists = {n: v for n, v in entry.search.items() if not isinstance(v, Range)}
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed))
        self._asked: list[Any] = []

    def ask(self) -> list[dict[str, Any]]:
        """See :meth:`Search.ask`."""
        count = min(self._batch, self._left)
        self._left -= count
        self._asked = [self._study.ask(self._space) for _ in range(count)]
        return [
            {n: self._lists[n][v] if n in self._lists else v for n, v in trial.params.items()}
            for trial in self._asked
        ]

    def tell(self, losses: Sequence[float]) -> None:
        """See :meth:`Search.tell`."""
        for trial, loss in zip(self._asked, losses, strict=True):
            self._study.tell(trial, loss)


def edges(search: Mapping[str, Range | Sequence[Any]], best: Mapping[str, Any]) -> list[str]:
    """Settings whose best value lies at an end of what was searched: a better may lie beyond.

    Of a range these are the outer 5 % on either side, or a grid's end points; of a list of
    numbers the smallest and the largest.
    """
    found = []
    for name, values in search.items():
        for end, reached in zip(("low", "high"), _at_ends(values, best[name]), strict=True):
            if reached:
                found.append(f"{name}={best[name]:.4g} at the {end} end")
    return found


def _at_ends(values: Range | Sequence[Any], value: Any) -> tuple[bool, bool]:
    """Whether a value is at the low or the high end of what was searched."""
    if isinstance(values, Range) and values.points is None:
        return values.place(value) <= EDGE, values.place(value) >= 1 - EDGE
    listed = _points(values) if isinstance(values, Range) else values
    if not all(type(other) in (int, float) for other in listed):
        return False, False
    return value == min(listed), value == max(listed)


def _grid(entry: Entry, trials: int) -> list[dict[str, Any]]:
    axes = {}
    for name, values in entry.search.items():
        if isinstance(values, Range) and values.points is None:
            raise ValueError(f"search.{name}.points is missing; a grid needs their number")
        axes[name] = _points(values) if isinstance(values, Range) else values
    found = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    if len(found) != trials:
        raise ValueError(
            f"search has a grid of {len(found)} point(s), but search.trials={trials}; all "
            "optimizers get the same number"
        )
    return found


def _points(values: Range) -> list[float]:
    assert values.points is not None
    found = []
    for number in range(values.points):
        share = number / (values.points - 1)
        if values.log:
            value = values.low * (values.high / values.low) ** share
        else:
            value = values.low + (values.high - values.low) * share
        # Without the noise of the last digits, so that it can be read and written.
        found.append(float(f"{value:.6g}"))
    return found


def _random(entry: Entry, settings: SearchSettings) -> Iterator[dict[str, Any]]:
    draw = random.Random(settings.seed)
    for _ in range(settings.trials):
        yield {
            name: _drawn(draw, values) if isinstance(values, Range) else draw.choice(values)
            for name, values in entry.search.items()
        }


def _drawn(draw: random.Random, values: Range) -> float:
    if values.log:
        value = math.exp(draw.uniform(math.log(values.low), math.log(values.high)))
        return min(max(value, values.low), values.high)  # exp(log(x)) may be off by a digit
    return draw.uniform(values.low, values.high)


def _distribution(values: Range | Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not isinstance(values, Range):
        # By place: Optuna keeps plain values only, and settings such as betas are lists.
        return CategoricalDistribution(tuple(range(len(values))))
    return FloatDistribution(values.low, values.high, log=values.log)
