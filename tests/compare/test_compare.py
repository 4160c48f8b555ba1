"""The comparison of optimizers: the same for all, the same after kills, and the main job's runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alto_ds.compare.__main__ import main
from alto_ds.compare.search import edges, make_search
from alto_ds.compare.spec import Entry, Range, SearchSettings, Spec, read_spec
from alto_ds.compare.study import check_optimizers, compare
from alto_ds.compare.tables import t_quantile
from alto_ds.compare.tasks import make_task
from alto_ds.pretrain.metrics import read_metrics
from alto_ds.pretrain.model import GPT2LMHeadModel
from tests.launcher import ROOT, settings
from tests.pretrain.forked import Forks
from tests.pretrain.runs import TEXTS

MODEL = {"model": "gpt2-tiny", "n_layer": 1, "n_embd": 32, "n_head": 2, "seq_length": 16}
ALTO: dict[str, Any] = {"type": "ALTO", "params": {"weight_decay": 0.01}}
SEEDS = [1, 2]
SPEC: dict[str, Any] = {
    "task": MODEL | {"vocab_size": 300, "files": [*map(str, TEXTS)], "evaluation_sequences": 60},
    "steps": 20,
    "batch_size": 8,
    "micro_batch_size": 4,
    "search": {"method": "grid", "trials": 3},
    "seeds": SEEDS,
    "optimizers": {
        "ALTO": ALTO | {"search": {"lr": [0.01, 0.1, 0.03]}},
        "the same": ALTO | {"search": {"lr": [0.01, 0.1, 0.03]}},
        "SGD": {
            "type": "SGD",
            "params": {"momentum": 0.9},
            "search": {"lr": {"low": 1e-4, "high": 1e30, "log": True, "points": 3}},
        },
    },
}


def write(folder: Path, spec: dict[str, Any]) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def results(folder: Path) -> tuple[str, ...]:
    """All that a comparison says, seconds aside."""
    rows = [row | {"seconds": ""} for row in runs(folder)]
    return (repr(rows), *((folder / name).read_text() for name in ("table.csv", "table.md")))


def runs(folder: Path, **wanted: str) -> list[dict[str, str]]:
    """Rows of runs.csv with these values."""
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if wanted.items() <= row.items()]


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return {row["optimizer"]: row for row in csv.DictReader(file)}


def start(spec: Path, output: Path, caches: Path) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "alto_ds.compare", str(spec), "--output_dir", str(output)],
        env=os.environ | settings(caches),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_after(
    process: subprocess.Popen[str], output: Path, count: int, alone: bool = False
) -> None:
    """Kill the command at a random moment after it has finished some runs, and see all of it end.

    Args:
        process: the command's.
        output: its folder.
        count: runs that it has finished, besides those that were there.
        alone: kill the command and leave its workers to themselves.
    """
    deadline = time.monotonic() + 120
    there = len([*output.glob("runs/*.json")])
    while len([*output.glob("runs/*.json")]) < there + count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() / 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    if alone:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.01)
    process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For results; what the datasets library of this process keeps goes there, too."""
    import datasets

    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """Results of a comparison that nobody interrupted, on one worker."""
    output = folder / "straight"
    compare(read_spec(write(folder, SPEC)), output)
    return output


def test_a_killed_comparison_ends_with_the_same_results_on_any_number_of_workers(
    straight: Path, folder: Path
) -> None:
    """The command alone is killed, and its workers end with it."""
    output, spec = folder / "killed", write(folder, SPEC | {"workers": 2})
    kill_after(start(spec, output, folder), output, 3, alone=True)
    assert not (output / "table.md").exists()
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("runs/*.json")}
    compare(read_spec(write(folder, SPEC)), output)
    assert results(output) == results(straight)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("runs/*.json")}
    assert before.items() <= after.items()  # what was done has not been done again
    assert 0 < len(before) < len(after)


@pytest.mark.slow  # pytest -m slow tests/compare: a minute
def test_a_long_search_killed_twice_ends_with_the_same_results(folder: Path) -> None:
    """3 optimizers, 3 rates by Optuna, 3 seeds; killed at random moments of any stage."""
    kinds = ("ALTO", "AdamW", "Muon")
    rates = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    spec = SPEC | {
        "search": {"method": "optuna", "trials": 3, "batch": 2},
        "seeds": [1, 2, 3],
        "optimizers": {kind: {"type": kind, "search": rates} for kind in kinds},
    }
    path = write(folder, spec | {"workers": 2})
    for output, kills in ((folder / "long", []), (folder / "long killed", [2, 5])):
        for count in kills:
            kill_after(start(path, output, folder), output, count)
        process = start(path, output, folder)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    assert results(folder / "long killed") == results(folder / "long")


def test_two_entries_with_the_same_optimizer_get_the_same_trials_and_results(
    straight: Path,
) -> None:
    one, other = (
        [
            {k: v for k, v in row.items() if k not in ("optimizer", "seconds", "run")}
            for row in runs(straight, optimizer=name)
        ]
        for name in ("ALTO", "the same")
    )
    assert one == other
    assert len(one) == 3 + len(SEEDS)
    files = [row["run"] for row in runs(straight)]
    assert len({*files}) == len(files)  # each was trained by itself
    curves = [
        {
            (straight / f"curves/{row['run']}.csv").read_text().splitlines()[1].split(",")[3]
            for row in runs(straight, stage=stage, seed=str(seed))
        }
        for stage, seed in (("search", 0), *(("final", seed) for seed in SEEDS))
    ]
    # All optimizers begin with the same weights and the same batch, others for each seed.
    assert [len(first_losses) for first_losses in curves] == [1] * 3
    assert len(set.union(*curves)) == 3


def test_the_setting_is_chosen_by_validation_text_and_told_where_it_is_at_an_edge(
    straight: Path,
) -> None:
    for name, row in table(straight).items():
        trials = runs(straight, optimizer=name, stage="search")
        assert all(trial["test_loss"] == "" for trial in trials)
        best = min(trials, key=lambda trial: float(trial["validation_loss"]))
        finals = runs(straight, optimizer=name, stage="final")
        assert {final["params"] for final in finals} == {best["params"]} == {row["params"]}
        values = [float(final["test_perplexity"]) for final in finals]
        assert float(row["test_perplexity"]) == statistics.fmean(values)
        half = 12.706 * statistics.stdev(values) / math.sqrt(2)
        assert float(row["interval_95"]) == pytest.approx(half, rel=1e-4)
    assert table(straight)["SGD"]["edges"] == "lr=0.0001 at the low end"
    assert table(straight)["ALTO"]["edges"] == "lr=0.1 at the high end"


def test_diverged_runs_are_kept_as_the_worst(straight: Path) -> None:
    trials = runs(straight, optimizer="SGD", stage="search")
    assert [trial["diverged"] for trial in trials] == ["0", "1", "1"]
    for trial in trials[1:]:
        assert trial["validation_loss"] == "inf"
        assert trial["why"].startswith("step ")
        assert 0 < int(trial["steps"]) < SPEC["steps"]
    assert table(straight)["SGD"]["diverged_search"] == "2"


def test_an_optimizer_that_always_diverges_is_last_in_the_table(folder: Path) -> None:
    one = {"type": "SGD", "params": {"lr": 1e30}}
    spec = SPEC | {
        "search": {"method": "random", "trials": 1},
        "seeds": [1],
        "optimizers": {"far": one, "near": {"type": "SGD", "params": {"lr": 0.1}}},
    }
    written = compare(read_spec(write(folder, spec)), folder / "far")
    assert [*table(folder / "far")] == ["near", "far"]
    assert table(folder / "far")["far"]["test_perplexity"] == "inf"
    assert "| far | diverged |" in written


def test_a_final_run_is_the_main_jobs_run(straight: Path, folder: Path) -> None:
    row = runs(straight, optimizer="ALTO", stage="final", seed="1")[0]
    config = {
        "train_batch_size": SPEC["batch_size"],
        "train_micro_batch_size_per_gpu": SPEC["micro_batch_size"],
        "optimizer": {"type": "ALTO", "params": json.loads(row["params"])},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 20, "warmup_num_steps": 2, "cos_min_ratio": 0.1},
        },
        "gradient_clipping": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = MODEL | {
        "deepspeed_config": folder / "config.json",
        "output_dir": folder / "main",
        "seed": 1,
        "dataset": straight / "data/train.jsonl",
        "tokenizer": straight / "data/tokenizer",
    }
    forks = Forks(folder)
    try:
        forks.run(1, *(word for k, v in options.items() for word in (f"--{k}", str(v))))
    finally:
        forks.close()
    of_main = [found["loss"] for found in read_metrics(folder / "main/metrics.jsonl")]
    with (straight / f"curves/{row['run']}.csv").open() as file:
        losses = [float(found["loss"]) for found in csv.DictReader(file)]
    assert len(losses) == SPEC["steps"]
    assert losses == pytest.approx(of_main, rel=1e-6)
    task = make_task(read_spec(write(folder, SPEC)).task, straight / "data")
    model = GPT2LMHeadModel.from_pretrained(folder / "main/model")
    found = task.evaluate(model, "test", SPEC["micro_batch_size"])
    assert found["loss"] == pytest.approx(float(row["test_loss"]), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "stepz is no setting; did you mean steps?"),
        ({"task": {"vocabsize": 3}}, "task.vocabsize is no setting; did you mean vocab_size?"),
        (
            {"task": {"files": ["x"], "seq_length": 200}},
            "task.seq_length=200: gpt2-tiny takes 128 tokens at most",
        ),
        ({"task": {"type": "text"}}, "task.files must name text, or else train, validation and"),
        ({"tokens": 1000}, "steps or tokens must say how long each run is, one of them"),
        ({"steps": 2}, "steps=2 makes 2 step(s), and the schedule's learning rate is 0 in the fi"),
        ({"steps": None, "tokens": 383}, "tokens=383 makes 2 step(s), and the schedule's"),
        ({"seeds": [0, 1]}, "seeds=[0, 1] must differ, also from search.seed=0"),
        ({"seeds": 3}, "seeds=3 must be a list"),
        ({"micro_batch_size": 3}, "batch_size=8 must be a multiple of micro_batch_size=3"),
        ({"schedule": {"warmup": 2}}, "schedule.warmup=2 must be in (0, 1)"),
        ({"search": {"method": "grid"}}, "search.trials is missing"),
        ({"optimizers": {}}, "optimizers has none"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {key: value for key, value in (SPEC | change).items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        read_spec(write(tmp_path, given))


@pytest.mark.parametrize(
    ("method", "entry", "message"),
    [
        ("grid", {"search": {"lr": [0.1, 1]}}, "search has a grid of 2 point(s), but search.tr"),
        ("grid", {"search": {"lr": {"low": 1, "high": 2}}}, "search.lr.points is missing"),
        ("grid", {"search": {"lr": [0.1]}}, "search.lr=[0.1] must be a list of at least 2 values"),
        ("grid", {"search": {"lr": [0.1, 1, 1]}}, "search.lr=[0.1, 1, 1] has a value twice"),
        ("random", {"search": {"lr": {"low": 2, "high": 2}}}, "search.lr.low=2 must be below high"),
        ("random", {"search": {"lr": {"low": 0, "high": 2, "log": True}}}, "must be above 0 with"),
        ("random", {"params": {"lr": 0.1}}, "search has nothing to try, but search.trials=3"),
        ("optuna", {"search": {"beta": [0.1, 1]}}, "search.lr is missing; give a range"),
        ("random", {"type": "Lyon", "search": {"lr": [0.1, 1]}}, "type='Lyon' must be one of ALTO"),
        (
            "random",
            {"type": "Lion", "params": {"wieght_decay": 1}, "search": {"lr": [0.1, 1]}},
            "params.wieght_decay is no setting; did you mean weight_decay?",
        ),
        (
            "random",
            {
                "type": "E",
                "params": {"optimizer": "SGD", "alpha": 9, "beta": 0.5},
                "search": {"lr": [1, 2]},
            },
            "params={'alpha': 9, 'beta': 0.5} is refused by E: ",
        ),
        (
            "random",
            {"search": {"lr": [0.1, 1], "betas": [[0.99, 0.9, 0.9], [0.1, 0.9, 0.9]]}},
            "is refused by ALTO: ",
        ),
        (
            "random",
            {"type": "E", "params": {"optimizer": "E"}, "search": {"lr": [0.1, 1]}},
            "params.optimizer='E' must name E's base: one of ALTO",
        ),
    ],
)
def test_what_an_optimizer_cannot_try_is_refused_before_anything_runs(
    method: str, entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    changed = {"search": {"method": method, "trials": 3}, "optimizers": {"X": ALTO | entry}}
    with pytest.raises(ValueError, match=rf"^optimizers\.X\..*{re.escape(message)}"):
        check_optimizers(read_spec(write(tmp_path, SPEC | changed)))


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write(tmp_path, SPEC)
    spec.write_text(spec.read_text() + "\nseeds: [7]\n")
    words = ["compare", str(spec), "--output_dir", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = f"alto_ds.compare: error: {spec}: seeds stands there twice; rename or remove one\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_a_search_proposes_the_same_again_and_by_the_losses_alone(method: str) -> None:
    space: dict[str, Any] = {
        "lr": Range(low=1e-4, high=1e-1, log=True),
        "betas": [[0.9, 0.99], [0.9, 0.999]],
        "weight_decay": Range(low=0, high=1),
    }
    search = SearchSettings(method=method, trials=30, seed=3)

    def trials(sign: int) -> list[dict[str, Any]]:
        made = make_search(Entry(type="AdamW", search=space), search)
        found: list[dict[str, Any]] = []
        while asked := made.ask():
            losses = [sign * abs(math.log(values["lr"] / 0.01)) for values in asked]
            made.tell([math.inf if len(found) == 0 else loss for loss in losses])
            found += asked
        return found

    assert trials(1) == trials(1)
    assert len(trials(1)) == 30
    for values in trials(1):
        assert 1e-4 <= values["lr"] <= 1e-1
        assert values["betas"] in space["betas"]
    assert (trials(1) != trials(-1)) is (method == "optuna")


def test_edges_are_the_outer_parts_of_ranges_and_the_ends_of_numbers() -> None:
    log = Range(low=1e-4, high=1, log=True)
    assert edges({"lr": log}, {"lr": 1.5e-4}) == ["lr=0.00015 at the low end"]
    assert edges({"lr": log}, {"lr": 3e-4}) == []
    assert edges({"lr": log}, {"lr": 0.7}) == ["lr=0.7 at the high end"]
    grid = dataclasses.replace(log, points=3)
    assert [len(edges({"lr": grid}, {"lr": lr})) for lr in (1e-4, 1e-2, 1.0)] == [1, 0, 1]
    numbers: dict[str, Any] = {"momentum": [0.9, 0.5, 0.99], "nesterov": [True, False]}
    assert edges(numbers, {"momentum": 0.9, "nesterov": True}) == []
    assert edges(numbers, {"momentum": 0.5, "nesterov": True}) == ["momentum=0.5 at the low end"]


def test_intervals_are_students() -> None:
    tabulated = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281, 30: 2.0423}
    for freedom, t in tabulated.items():
        assert t_quantile(freedom) == pytest.approx(t, abs=1e-4)


def test_a_json_says_the_same_as_a_yaml(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC))
    assert read_spec(path) == read_spec(write(tmp_path, SPEC))


def test_a_file_extends_another(tmp_path: Path) -> None:
    write(tmp_path, SPEC)
    above = tmp_path / "above.yaml"
    above.write_text("extends: spec.yaml\nsteps: 7\noptimizers: {SGD: {search: {lr: {high: 9}}}}\n")
    found, below = read_spec(above), read_spec(tmp_path / "spec.yaml")
    lr = found.optimizers["SGD"].search["lr"]
    assert lr == Range(low=1e-4, high=9, log=True, points=3)
    kept = {name: found.optimizers[name] for name in found.optimizers if name != "SGD"}
    assert kept.items() <= below.optimizers.items()
    assert found == dataclasses.replace(below, steps=7, optimizers=found.optimizers)
    (tmp_path / "seeds.yaml").write_text("seeds: [8, 9]\nsteps: 3\n")
    above.write_text("extends: [spec.yaml, seeds.yaml]\nsteps: 5\n")
    assert read_spec(above) == dataclasses.replace(below, steps=5, seeds=[8, 9])
    for name, message in (
        ("above.yaml", "extends='above.yaml' comes back to that file; name another"),
        ("none.yaml", "extends='none.yaml': [Errno 2] No such file"),
    ):
        above.write_text(f"extends: {name}\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            read_spec(above)


def test_the_readmes_example_is_a_comparison(tmp_path: Path) -> None:
    readme = (ROOT / "alto_ds/compare/README.md").read_text()
    path = tmp_path / "example.yaml"
    path.write_text(readme.split("```yaml\n")[1].split("```")[0])
    spec = read_spec(path)
    check_optimizers(spec)
    assert isinstance(spec, Spec)
    assert spec.optimizers["ALTO"].search["lr"] == Range(low=1e-3, high=1e-1, log=True)
