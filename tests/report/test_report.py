"""The page says what is in the files, on any screen, and loads nothing."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alto_ds.pretrain.metrics import Metrics, read_metrics
from alto_ds.report import __main__ as report
from alto_ds.report.page import _unlike
from alto_ds.report.pictures import draw_results, looks, spread
from alto_ds.report.reading import read_studies
from tests import in_process
from tests.report.folders import (
    LAYERS,
    STEPS,
    WHY,
    add_model,
    write_comparison,
    write_run,
)

# Matplotlib's, of a picture with too little room.
pytestmark = pytest.mark.filterwarnings("error:constrained_layout")

SCREENS = [1280, 768, 375]  # widths of a desktop, a tablet and a phone
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
T_2 = 4.302652729749464  # of Student's t: P(|T| < t) = 0.95 with 2 degrees of freedom


class Page(HTMLParser):
    """Tables of a page as rows of cells, and all attributes of all tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._in_cell = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def rows(self, *head: str) -> list[dict[str, str]]:
        """Of the only table whose heading has these cells."""
        (table,) = [table for table in self.tables if {*head} <= {*table[0]}]
        return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Runs the command in this process; gives what it prints, and its exit status."""

    def run(*words: Any) -> SimpleNamespace:
        return in_process.call(report, monkeypatch, capsys, *map(str, words))

    return run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("made") / "study", ["ALTO", "SGD", "E <Lion>"])


def test_numbers_on_the_page_are_those_of_the_files(
    comparison: Path, tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    assert call(comparison, "--output_dir", tmp_path).out == f"{tmp_path / 'index.html'}\n"
    page = Page(tmp_path / "index.html")
    with (comparison / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    with (comparison / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    shown = page.rows("test perplexity (95 %)")
    assert [row["optimizer"] for row in shown] == [row["optimizer"] for row in table]
    for row, line in zip(shown, table, strict=True):
        assert row["batch size"] == "8"
        assert row["note"] == line["edges"] == "lr=0.001 at the low end"
        assert row["setting"] == "weight_decay 0.1, lr 0.001"
        assert row["seeds (diverged)"] == f"{line['seeds']} ({line['diverged_final']})"
        assert row["trials (diverged)"] == f"{line['trials']} ({line['diverged_search']})"
        # Half of the interval of two seeds is 12.7 · 7.07 / √2.
        assert row["sharpness (95 %)"] == ("15 ± 64" if line["optimizer"] == "ALTO" else "")
        if line["optimizer"] != "SGD":
            mean, half = float(line["test_perplexity"]), float(line["interval_95"])
            assert row["test perplexity (95 %)"] == f"{mean:.2f} ± {half:.2f}"
            assert row["deviation"] == f"{float(line['standard_deviation']):.3f}"
            low, high = float(line["lowest"]), float(line["highest"])
            assert row["range"] == f"{low:.2f} to {high:.2f}"
    assert [
        (row["optimizer"], row["seed"], row["test perplexity"], row["steps"], row["seconds"])
        for row in sorted(page.rows("seed", "tokens"), key=lambda row: row["run"])
    ] == [
        (
            *(run["optimizer"], run["seed"], f"{float(run['test_perplexity']):.4f}"),
            *(run["steps"], f"{float(run['seconds']):.1f}"),
        )
        for run in sorted(runs, key=lambda run: run["run"])
        if run["stage"] == "final"
    ]
    trials = [run for run in runs if run["stage"] == "search"]
    assert [row["validation loss"] for row in page.rows("validation loss")] == [
        f"{float(run['validation_loss']):.4f}" for run in trials
    ]
    spec = json.loads((comparison / "spec.json").read_text())
    settings = {row["setting"]: row["value"] for row in page.rows("setting", "value")}
    assert settings["task.vocab_size"] == str(spec["task"]["vocab_size"])
    assert settings["versions.torch"] == "1.2.3"
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    curves = {f"loss1_{name}" for name in ("tokens", "step", "seconds")}
    rates = {f"rates1_{place}" for place in (1, 2, 3)}
    assert pictures == {"results1", *curves, *rates, "trust_ratios1"}
    assert ">ALTO, seed 1</text>" in page.text
    (study,) = read_studies([comparison])
    (maps,) = [h.trust_ratios for r in study.results for h in r.histories if h.trust_ratios]
    of_first_seed = {step: dict.fromkeys(LAYERS, float(step)) for step in (STEPS // 2, STEPS)}
    assert maps == of_first_seed
    assert page.text.count("<svg") == len(pictures)


def test_a_diverged_run_is_shown(
    comparison: Path, tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    call(comparison, "--output_dir", tmp_path)
    page = Page(tmp_path / "index.html")
    (sgd,) = [row for row in page.rows("test perplexity (95 %)") if row["optimizer"] == "SGD"]
    assert (sgd["test perplexity (95 %)"], sgd["seeds (diverged)"]) == ("diverged", "2 (1)")
    ends = [row["end"] for row in page.rows("seed", "tokens") if row["optimizer"] == "SGD"]
    assert ends == ["finite", f"diverged at {WHY}"]
    trials = {row["setting"]: row["end"] for row in page.rows("validation loss", "end")[3:6]}
    assert [*trials.values()] == ["finite", "finite", f"diverged at {WHY}"]
    assert ">1 of 2 diverged</text>" in page.text
    (study,) = read_studies([comparison])
    diverged = {h.name: len(h.training) for r in study.results for h in r.histories if h.diverged}
    assert diverged == {"SGD-0.001-2": 6}  # steps with a finite loss


def test_a_run_whose_loss_was_not_finite_is_shown_as_diverged(
    tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    folders = [write_run(tmp_path / f"lion{seed}", seed, "Lion") for seed in (1, 2, 3, 4)]
    metrics = folders[1] / "metrics.jsonl"
    *first, last = metrics.read_text().splitlines()
    row = json.loads(last) | {"val_loss": math.nan, "val_ppl": math.inf}
    metrics.write_text("\n".join([*first, json.dumps(row), ""]))
    for folder, done, why in (
        (folders[2], 40, "ALTO: step 41: wte.weight has numbers that are not finite. Start again."),
        (folders[3], 0, "step 1: the loss is nan."),
    ):
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in first[:done]))
        (folder / "diverged.json").write_text(json.dumps({"step": done + 1, "why": why}))
    call(*folders, "--output_dir", tmp_path)
    page = Page(tmp_path / "index.html")
    (lion,) = page.rows("held-out perplexity (95 %)")
    assert (lion["held-out perplexity (95 %)"], lion["seeds (diverged)"]) == ("diverged", "4 (3)")
    assert "note" not in lion  # such as that runs have not reached their last step
    ends = {row["seed"]: (row["end"], row["steps"]) for row in page.rows("seed", "tokens")}
    assert ends == {
        "1": ("finite", "60"),
        "2": (f"diverged at step {STEPS}: held-out loss nan", "60"),
        "3": ("diverged at step 41: wte.weight has numbers that are not finite", "40"),
        "4": ("diverged at step 1: the loss is nan", "0"),
    }
    assert ">3 of 4 diverged</text>" in page.text
    (study,) = read_studies(folders)
    assert {trial.lr for trial in study.trials} == {0.01}


def test_the_mark_of_a_run_that_was_not_finite_is_no_step_and_goes_when_it_is_resumed(
    tmp_path: Path,
) -> None:
    row = {"loss": 1.0, "ppl": 2.7, "lr": 0.1}
    with closing(Metrics(tmp_path, 0, 9, active=True)) as metrics:
        for step in (1, 2, 3):
            metrics.step({"step": step} | row)
        metrics.diverged("step 4: the loss is nan.")
    mark = tmp_path / "diverged.json"
    assert json.loads(mark.read_text()) == {"step": 4, "why": "step 4: the loss is nan."}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    Metrics(tmp_path, 2, 9, active=False).diverged("of another rank")
    assert json.loads(mark.read_text())["step"] == 4
    with closing(Metrics(tmp_path, 2, 9, active=True)) as metrics:
        assert not mark.exists()
        metrics.diverged("step 3: the loss is nan.")
    assert json.loads(mark.read_text())["step"] == 3


def test_seeds_of_a_run_are_one_result_with_an_interval_by_student(
    tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    losses = {1: 3.9, 2: 4.0, 3: 4.3}
    folders = [write_run(tmp_path / f"alto{s}", s, loss=loss) for s, loss in losses.items()]
    folders.append(write_run(tmp_path / "adamw", 1, "AdamW", 1e-3, loss=4.5, batch_size=16))
    unfinished = write_run(tmp_path / "lion", 1, "Lion", loss=5.0)
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(["{broken\n", *lines[1:40]]))
    (unfinished / "versions.json").write_text('{"torch": "5.0"}')
    output = tmp_path / "page"
    assert call(*folders, unfinished, "--output_dir", output).status == 0
    page = Page(output / "index.html")
    rows = {row["optimizer"]: row for row in page.rows("held-out perplexity (95 %)")}
    assert [*rows] == ["ALTO", "AdamW", "Lion"]
    at_end = 3 * math.exp(-STEPS / 20)
    values = [math.exp(loss + at_end) for loss in losses.values()]
    half = T_2 * statistics.stdev(values) / math.sqrt(3)
    shown = f"{statistics.fmean(values):.2f} ± {half:.2f}"
    assert rows["ALTO"]["held-out perplexity (95 %)"] == shown
    assert rows["ALTO"]["seeds (diverged)"] == "3 (0)"
    assert rows["AdamW"]["held-out perplexity (95 %)"] == f"{math.exp(4.5 + at_end):.2f}"
    assert rows["Lion"]["note"] == "lion at step 30 of 60, its last evaluation"
    text = html.unescape(page.text)
    assert "The runs differ in more than the optimizer: train_batch_size, versions." in text
    assert text.count("<tr><td>versions.torch</td><td>4.5.6</td></tr>") == len(folders)
    assert text.count("<tr><td>versions.torch</td><td>5.0</td></tr>") == 1
    assert f"1 lines of {unfinished / 'metrics.jsonl'} cannot be read: left out." in text
    (alto, *_) = [row for row in page.rows("seed", "tokens") if row["run"] == str(folders[1])]
    assert (alto["tokens"], alto["seconds"]) == ("15,360", "30.0")  # of 512 tokens a second
    for layer in LAYERS:
        name = layer.removeprefix("transformer.").removesuffix(".weight")
        assert f">{name}</text>" in page.text
    assert len([*output.glob("trust_ratios*.png")]) == len(folders) + 1


def test_several_batch_sizes_are_beside_each_other(
    tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    sizes = [8, 128, 32]
    folders = [write_comparison(tmp_path / f"batch{s}", ["ALTO", "SGD"], s) for s in sizes]
    call(*folders, "--output_dir", tmp_path / "page")
    page = Page(tmp_path / "page" / "index.html")
    rows = page.rows("batch size", "test perplexity", "setting")
    assert [(row["optimizer"], row["batch size"]) for row in rows] == [
        (name, size) for name in ("ALTO", "SGD") for size in ("8", "32", "128")
    ]
    for row in rows[:3]:
        with (tmp_path / f"batch{row['batch size']}" / "table.csv").open() as file:
            line = next(csv.DictReader(file))
        mean, half = float(line["test_perplexity"]), float(line["interval_95"])
        assert row["test perplexity"] == f"{mean:.2f} ± {half:.2f}"
    assert {row["test perplexity"] for row in rows[3:]} == {"diverged"}
    assert (tmp_path / "page" / "batch_size1.png").exists()
    assert "not all that differs" not in page.text
    spec = json.loads((folders[0] / "spec.json").read_text())
    (folders[0] / "spec.json").write_text(json.dumps(spec | {"steps": 2 * STEPS}))
    run = write_run(tmp_path / "run", loss=0.1)  # of other text
    call(*folders[:2], run, "--output_dir", tmp_path / "page")
    page = Page(tmp_path / "page" / "index.html")
    assert "The batch size is not all that differs: steps." in page.text
    assert page.rows("batch size", "test perplexity", "setting")[0] == rows[0]


def test_a_page_of_image_classification_speaks_of_its_metric_and_of_examples(
    tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    """Of two lengths, so that the picture by the number of steps is there, too."""
    lengths = [60, 20]
    folders = [
        write_comparison(tmp_path / f"of {steps}", ["ALTO"], steps=steps, metric="error")
        for steps in lengths
    ]
    call(*folders, "--output_dir", tmp_path / "page")
    page = Page(tmp_path / "page" / "index.html")
    shown = page.text.partition("<body>")[2].partition("Settings and versions")[0]
    words = re.sub(r"<[^>]*>", " ", shown) + " ".join(re.findall('aria-label="[^"]*"', shown))
    for wrong in ("perplexity", "token", "sequence", "text"):
        assert wrong not in words.lower()
    assert ">loss (nats)</text>" in shown
    assert ">examples</text>" in shown
    assert "<h2>Test error by number of steps, batch size 8</h2>" in shown
    assert "by batch size" not in shown
    assert "not all that differs" not in shown
    assert (tmp_path / "page" / "steps1_8.png").exists()
    for row, steps in zip(page.rows("steps", "test error", "setting"), (20, 60), strict=True):
        with (tmp_path / f"of {steps}" / "table.csv").open() as file:
            (line,) = csv.DictReader(file)
        mean, half = float(line["test_error"]), float(line["interval_95"])
        assert (row["steps"], row["test error"]) == (str(steps), f"{mean:.2f} ± {half:.2f}")


@pytest.mark.parametrize(("steps", "says"), [(30, []), (31, ["steps"])])
def test_as_many_examples_in_steps_of_another_batch_size_are_no_difference(
    steps: int, says: list[str], tmp_path: Path
) -> None:
    sizes = {8: 60, 16: steps}
    studies = read_studies(
        [write_comparison(tmp_path / f"{size}", ["ALTO"], size, n) for size, n in sizes.items()]
    )
    found = [f"The batch size is not all that differs: {', '.join(says)}."] if says else []
    assert _unlike(studies, "batch_size") == found


def test_a_metric_of_0_has_a_picture(tmp_path: Path) -> None:
    (study,) = read_studies([write_comparison(tmp_path / "study", ["ALTO"], metric="error")])
    (result,) = study.results
    best = replace(result.histories[0], value=0.0)
    result = replace(result, histories=[best, *result.histories[1:]], mean=1.0, interval=1.0)
    study = replace(study, results=[result])
    (axis,) = draw_results(study, looks([study])).axes
    assert axis.get_xscale() == "linear"
    assert axis.get_xlim()[0] < 0


def test_sharpness_is_measured_where_it_is_asked_for(
    tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    run = write_run(tmp_path / "run", seq_length=6)
    add_model(run)
    call(run, "--sharpness", "--sharpness_sequences", 5)
    page = Page(run / "report" / "index.html")
    (row,) = page.rows("largest eigenvalue")
    assert (row["run"], row["sequences"], row["model"]) == (f"ALTO, {run}", "5", f"{run / 'model'}")
    assert 0 <= float(row["residual"]) < float(row["largest eigenvalue"])
    assert (run / "report" / "sharpness.png").exists()


def test_a_browser_would_load_nothing(
    comparison: Path, tmp_path: Path, call: Callable[..., SimpleNamespace]
) -> None:
    run = write_run(tmp_path / "run")
    call(comparison, run, "--output_dir", tmp_path / "page")
    page = Page(tmp_path / "page" / "index.html")
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name.split(":")[-1] in ("href", "src", "srcset", "data", "action")
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert all(url.startswith("#") for url in re.findall(r"url\(\s*['\"]?([^)]*)", page.text))
    assert "@import" not in page.text
    assert "default-src 'none'" in page.text  # and so would the browser, whatever is in a name
    assert "E &lt;Lion&gt;" in page.text
    assert "E <Lion>" not in page.text


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is here ({', '.join(BROWSERS)}); apt-get install chromium")
    return found


SCRIPT = """
<body><script>
const found = [];
const done = () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument.documentElement;
    frame.contentDocument.querySelectorAll("details").forEach(part => part.open = true);
    const style = table => frame.contentWindow.getComputedStyle(table).overflowX;
    const texts = [...frame.contentDocument.querySelectorAll("svg text")];
    const inside = (a, b) => a.left > b.left - 2 && a.right < b.right + 2 &&
                             a.top > b.top - 2 && a.bottom < b.bottom + 2;
    const tables = [...frame.contentDocument.querySelectorAll(".table")];
    found.push({
      width: frame.contentWindow.innerWidth,
      needed: page.scrollWidth,
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
      hidden: tables.filter(t => t.scrollWidth > t.clientWidth && style(t) != "auto").length,
      smallest: Math.min(...texts.map(t => t.getBoundingClientRect().height)),
      outside: texts.filter(t => !inside(t.getBoundingClientRect(),
                                         t.closest("svg").getBoundingClientRect()))
                    .map(t => t.textContent),
    });
  }
  document.body.textContent = JSON.stringify(found);
};
window.onload = () => setTimeout(done, 300);
</script>FRAMES</body>
"""


def test_a_browser_shows_it_on_desktop_and_phone_without_scrolling_sideways_or_a_request(
    comparison: Path, tmp_path: Path, browser: str, call: Callable[..., SimpleNamespace]
) -> None:
    """The page is measured in frames of the screens' widths, without its ban on loading."""
    runs = [write_run(tmp_path / "alto"), write_run(tmp_path / "alto16", batch_size=16)]
    call(comparison, *runs, "--output_dir", tmp_path)
    text = (tmp_path / "index.html").read_text()
    page = re.sub(r"<meta http-equiv[^>]*>", "", text)
    assert page != text
    (tmp_path / "page.html").write_text(page)
    frames = [
        f'<iframe src="page.html" width="{width}" height="800"></iframe>' for width in SCREENS
    ]
    (tmp_path / "frames.html").write_text(SCRIPT.replace("FRAMES", "".join(frames)))
    dump = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'browser'}"),
            *("--virtual-time-budget=5000", (tmp_path / "frames.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(html.unescape(re.findall(r"<body>(\[.*\])</body>", dump.stdout)[0]))
    assert [screen["width"] for screen in found] == SCREENS
    for screen in found:
        assert screen["needed"] <= screen["width"], screen
        assert screen["loaded"] == [], screen
        assert screen["hidden"] == 0, screen
        assert screen["smallest"] >= 8, screen  # pixels that text in pictures is high
        assert screen["outside"] == [], screen


def test_more_optimizers_than_colours_look_different(tmp_path: Path) -> None:
    names = [f"number {place}" for place in range(15)]
    (study,) = read_studies([write_comparison(tmp_path / "study", names)])
    assert len(set(looks([study]).values())) == len(names)


def test_names_do_not_overlap_and_stay_beside_the_axes() -> None:
    for places in ([0.5] * 4, [0.0, 0.01, 0.9, 1.0], [0.97, 0.98, 0.99], [0.1, 0.5]):
        found = spread(places, 0.2)
        gaps = [after - before for before, after in itertools.pairwise(found)]
        assert min(gaps) >= 0.2 - 1e-9
        assert min(found) >= -1e-9
        assert max(found) <= 1
    assert spread([0.1, 0.5], 0.2) == [0.1, 0.5]


def broken(folder: Path, name: str, text: str | None) -> Path:
    """Replace a file of a folder, or remove it."""
    path = folder / name
    path.unlink() if text is None else path.write_text(text)
    return folder


@pytest.fixture
def cases(tmp_path: Path) -> dict[str, list[Any]]:
    def study(name: str) -> Path:
        return write_comparison(tmp_path / name, ["ALTO"])

    twins = [write_run(tmp_path / name) for name in ("first", "second")]
    add_model(with_model := write_run(tmp_path / "j"))
    return {
        "neither": [tmp_path],
        "nothing": [tmp_path / "nothing"],
        "twice": [twins[0], twins[0]],
        "twins": twins,
        "unfinished": [broken(study("a"), "table.csv", None)],
        "cut": [broken(study("b"), "runs.csv", "optimizer,stage\nALTO\n")],
        "empty": [broken(study("c"), "runs.csv", "optimizer,stage\n")],
        "no curve": [broken(study("d"), "curves/ALTO-0.001-1.csv", None)],
        "no json": [broken(study("e"), "spec.json", "[1]")],
        "no step": [broken(write_run(tmp_path / "f"), "metrics.jsonl", "")],
        "no metrics": [broken(write_run(tmp_path / "g"), "metrics.jsonl", None)],
        "old": [broken(write_run(tmp_path / "h"), "run.json", '{"seed": 1}')],
        "no weights": [study("i"), "--sharpness"],
        "no text": [twins[0], "--sharpness"],
        "no model": [broken(with_model, "model/config.json", None), "--sharpness"],
        "no sequences": [twins[0], "--sharpness", "--sharpness_sequences", 0],
    }


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("neither", "is no output folder of alto_ds.compare, which has spec.json, nor of alto_ds"),
        ("nothing", "nothing is no output folder"),
        ("twice", "names a folder twice"),
        ("twins", "second have the same settings and seed=1, but intervals are over seeds"),
        ("unfinished", "a: there is no table.csv: the comparison has not ended; its command"),
        ("cut", "b: runs.csv has a row that is cut off"),
        ("empty", "c: table.csv or runs.csv is empty"),
        ("no curve", "No such file or directory"),
        ("no json", "e: spec.json is no JSON object"),
        ("no step", "f: metrics.jsonl has no step, so there is nothing to show yet"),
        ("no metrics", "g: metrics.jsonl has no step"),
        ("old", "h: a file has no 'optimizer'; another version wrote it"),
        ("no weights", "--sharpness needs a run of alto_ds.pretrain; a comparison keeps no"),
        ("no text", "first has no held_out.npy, the text that a run holds out"),
        ("no model", "has no "),
        ("no sequences", "--sharpness_sequences=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    case: str, message: str, cases: dict[str, list[Any]], call: Callable[..., SimpleNamespace]
) -> None:
    found = call(*cases[case])
    assert found.status == 2
    (line,) = found.err.splitlines()
    assert message in line


@pytest.mark.slow  # pytest -m slow tests/report: half a minute
def test_the_command_makes_a_page_of_what_the_comparison_has_written(tmp_path: Path) -> None:
    from tests.compare.test_compare import SPEC, start, write

    path = write(tmp_path, SPEC | {"seeds": [1]})
    output = tmp_path / "study"
    words, _ = (process := start(path, output, tmp_path)).communicate(timeout=300)
    assert process.returncode == 0, words
    command = [sys.executable, "-m", "alto_ds.report", str(output)]
    subprocess.run(command, check=True, timeout=120)
    page = Page(output / "report" / "index.html")
    rows = page.rows("test perplexity (95 %)")
    assert {row["optimizer"] for row in rows} == {*SPEC["optimizers"]}
