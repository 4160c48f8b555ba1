"""A comparison from its settings to its tables: search, final runs, and going on after a kill."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alto_ds.compare.files import read_result
from alto_ds.compare.optimizers import make_optimizers
from alto_ds.compare.run import Conditions, Run, finish
from alto_ds.compare.search import edges, make_search
from alto_ds.compare.spec import Entry, Range, Spec
from alto_ds.compare.tables import summary, write_runs, write_table
from alto_ds.compare.task import Parameters, Task
from alto_ds.compare.tasks import make_task, prepare
from alto_ds.files import replace_text

COMPUTES = ("alto-ds", "deepspeed", "pytorch-optimizer", "torch", "transformers")

Result = Mapping[str, Any]
Do = Callable[[Iterable[Run]], Iterable[Result]]
FinishAll = Callable[[Sequence[Run]], list[Result]]


def check_optimizers(spec: Spec, of: Parameters | None = None) -> None:
    """Make all optimizers with the settings that they will try.

    Args:
        spec: of the comparison.
        of: the model's parameters; None for a few numbers in their place.

    Raises:
        ValueError: names the optimizer and the setting.
    """
    for name, entry in spec.optimizers.items():
        try:
            proposed = make_search(entry, spec.search).ask()  # of optuna's the first only
            for values in (*_extremes(entry), *proposed):
                params = {**entry.params, **values}
                make_optimizers(entry.type, params, of or _few_parameters())
        except ValueError as error:
            raise ValueError(f"optimizers.{name}.{error}") from None


def compare(spec: Spec, folder: Path) -> str:
    """Search, choose, train anew with other seeds, and write all of it down.

    Runs that are there are not done again, so that the same call goes on after a kill, and gives
    the same table.

    Args:
        spec: what to compare.
        folder: for the results; see the package's README.

    Returns:
        The table in Markdown.

    Raises:
        ValueError: a setting or the data does not fit.
    """
    check_optimizers(spec)
    for name in ("runs", "curves", "ratios"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    conditions = _conditions(spec, folder)
    task = make_task(spec.task, folder / "data")
    _check_task(task, spec)
    about = dataclasses.asdict(spec) | dataclasses.asdict(conditions)
    about |= {"python": platform.python_version(), "machine": platform.machine()}
    replace_text(folder / "spec.json", json.dumps(about, indent=1) + "\n")
    with _workers(spec, folder) as do:
        finish_all = functools.partial(_finish_all, spec=spec, folder=folder, do=do)
        trials = _search(spec, conditions, finish_all)
        best = {name: min(found, key=_validation_loss) for name, found in trials.items()}
        finals = _finals(spec, conditions, best, finish_all)
    write_runs(folder, [run for part in (trials, finals) for some in part.values() for run in some])
    headline = task.headline
    rows = [
        summary(
            trials[name],
            best[name],
            finals[name],
            edges(entry.search, best[name]["params"]),
            headline,
        )
        for name, entry in spec.optimizers.items()
    ]
    return write_table(folder, rows, headline)


def _check_task(task: Task, spec: Spec) -> None:
    """Refuse a batch that the data does not fill, and optimizers that do not take the model."""
    task.batches(spec.search.seed, spec.batch_size, spec.micro)
    if spec.sharpness:
        try:
            task.batches(spec.search.seed, spec.sharpness, 1)
        except ValueError as error:
            raise ValueError(f"sharpness={spec.sharpness} is too large: {error}") from None
    check_optimizers(spec, task.parameters(task.model(spec.search.seed)))


def _conditions(spec: Spec, folder: Path) -> Conditions:
    seeds = [spec.search.seed, *spec.seeds]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return Conditions(
        fingerprint=prepare(spec.task, seeds, folder / "data"),
        device="cpu" if device is None else device.type,
        versions={name: metadata.version(name) for name in COMPUTES},
    )


def _search(spec: Spec, conditions: Conditions, finish_all: FinishAll) -> dict[str, list[Result]]:
    """All trials of each optimizer, in the order in which they were proposed."""
    searches = {name: make_search(entry, spec.search) for name, entry in spec.optimizers.items()}
    trials: dict[str, list[Result]] = {name: [] for name in searches}
    while True:
        asked = {name: search.ask() for name, search in searches.items()}
        if not any(asked.values()):
            return trials
        runs = {
            name: [
                _run(spec, conditions, name, {**spec.optimizers[name].params, **values}, None)
                for values in proposed
            ]
            for name, proposed in asked.items()
        }
        for name, results in _by_name(runs, finish_all).items():
            searches[name].tell([_validation_loss(result) for result in results])
            first = len(trials[name])
            trials[name] += [{**r, "trial": first + i} for i, r in enumerate(results)]


def _finals(
    spec: Spec, conditions: Conditions, best: Mapping[str, Result], finish_all: FinishAll
) -> dict[str, list[Result]]:
    """The final runs of each optimizer with its best setting."""
    runs = {
        name: [_run(spec, conditions, name, chosen["params"], seed) for seed in spec.seeds]
        for name, chosen in best.items()
    }
    found = _by_name(runs, finish_all)
    return {name: [{**r, "trial": None} for r in results] for name, results in found.items()}


def _run(
    spec: Spec, conditions: Conditions, name: str, params: Mapping[str, Any], seed: int | None
) -> Run:
    """A final run with a seed, or one of the search."""
    return Run(
        optimizer=name,
        type=spec.optimizers[name].type,
        params=params,
        stage="search" if seed is None else "final",
        seed=spec.search.seed if seed is None else seed,
        conditions=conditions,
    )


def _by_name(runs: Mapping[str, Sequence[Run]], finish_all: FinishAll) -> dict[str, list[Result]]:
    results = iter(finish_all([run for some in runs.values() for run in some]))
    return {name: [next(results) for _ in some] for name, some in runs.items()}


def _validation_loss(result: Result) -> float:
    return math.inf if result["diverged"] is not None else result["validation"]["loss"]


def _finish_all(runs: Sequence[Run], spec: Spec, folder: Path, do: Do) -> list[Result]:
    """Do the runs that are not there, and read all, in their order."""
    keys = [run.key(spec) for run in runs]
    # A trial may be proposed twice.
    missing = {k: r for k, r in zip(keys, runs, strict=True) if read_result(folder, k) is None}
    print(f"{len(missing)} runs to do, of {len(runs)}", flush=True)
    for number, result in enumerate(do(missing.values()), start=1):
        print(f"[{number}/{len(missing)}] {_line(result)}", flush=True)
    results = [(key, read_result(folder, key)) for key in keys]
    return [result | {"run": key} for key, result in results if result is not None]


@contextmanager
def _workers(spec: Spec, folder: Path) -> Iterator[Do]:
    """Give what does runs, on several processes where there are to be several workers.

    It yields results as they come, in any order.
    """
    finish_one = functools.partial(finish, spec=spec, folder=folder)
    if spec.workers == 1:
        yield functools.partial(map, finish_one)
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for number in range(spec.workers):
        places.put(number)
    with ProcessPoolExecutor(
        spec.workers, mp_context=context, initializer=_begin_worker, initargs=(places,)
    ) as pool:

        def do(runs: Iterable[Run]) -> Iterator[Result]:
            for future in as_completed([pool.submit(finish_one, run) for run in runs]):
                yield future.result()

        try:
            yield do
        except BaseException:  # such as Ctrl-C: do not wait for the runs under way
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _begin_worker(places: Any) -> None:
    """End with the process that started this one, and take turns on the accelerators."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first says so
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(places.get() % torch.accelerator.device_count())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _line(result: Result) -> str:
    end = result["diverged"]
    if end is None:
        end = ", ".join(
            f"{part} loss {result[part]['loss']:.4f}"
            for part in ("validation", "test")
            if result[part] is not None
        )
    else:
        end = f"diverged at {end}"
    params = ", ".join(f"{key}={value}" for key, value in result["params"].items())
    return (
        f"{result['optimizer']} ({params}), {result['stage']}, seed {result['seed']}: {end}, "
        f"{result['seconds']} s"
    )


def _extremes(entry: Entry) -> Iterator[dict[str, Any]]:
    """What has each value of the lists, and both ends of the ranges, at least once."""
    axes = {
        name: [values.low, values.high] if isinstance(values, Range) else values
        for name, values in entry.search.items()
    }
    first = {name: values[0] for name, values in axes.items()}
    yield first
    for name, values in axes.items():
        for value in values[1:]:
            yield {**first, name: value}


def _few_parameters() -> Parameters:
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    return Parameters(
        hidden=[nn.Parameter(matrix)],
        outer=[nn.Parameter(matrix)],
        undecayed=[nn.Parameter(vector)],
    )
