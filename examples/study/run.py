"""Run the study: all comparisons in ``specs/``, then its tables, pages and figure.

.. code-block:: bash

    python examples/study/run.py --data DATA --output_dir runs/study

``DATA`` holds ``wikitext2-test.txt``, ``wikitext2-valid.txt``, ``tinyshakespeare.txt`` and, in
``mnist/``, the four IDX files of MNIST. The same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The pages, and the comparisons that each puts side by side.
PAGES = {
    "alpha": ["alpha", "momentum"],
    "batch": ["batch-32", "batch-32-fine", "batch-512", "batch-8192"],
    "epochs": ["epochs-1", "epochs-5", "epochs-30", "epochs-150", "epochs-150-fine"],
    "e": ["e"],
    "shakespeare": ["shakespeare"],
    "mnist": ["mnist-512", "mnist-8192", "mnist-8192-fine", "mnist-54000"],
    "mnist-noise": ["mnist-8192-noise20", "mnist-8192-noise20-fine", "mnist-8192-noise40"],
    "digits": ["digits-noise0", "digits-noise20", "digits-noise40"],
}


def main() -> None:
    """Run what is not there yet, and write ``results/`` beside this file."""
    parser = argparse.ArgumentParser(description="Run the study of optimizers.")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts and MNIST")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"), help="of all runs")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=[*PAGES])
    given = parser.parse_args()
    runs, results = given.output_dir.resolve(), HERE / "results"
    results.mkdir(exist_ok=True)
    for page in given.pages:
        for name in PAGES[page]:
            spec = HERE / "specs" / f"{name}.yaml"
            call("alto_ds.compare", spec, "--output_dir", runs / name, folder=given.data)
        output = Path("pages", page)
        call("alto_ds.report", *PAGES[page], "--output_dir", output, folder=runs)
        written = (runs / output / "index.html").read_bytes()
        (results / f"{page}.html").write_bytes(written)
        for kind in ("table", "runs"):
            rows = [row for name in PAGES[page] for row in read(runs / name / f"{kind}.csv", name)]
            write(results / f"{page}-{kind}.csv", rows)
    done = {row["run"]: row for path in runs.glob("*/runs.csv") for row in read(path, "")}
    hours = sum(float(row["seconds"]) for row in done.values()) / 3600
    print(f"{len(done)} runs, {hours:.2f} hours of training on one core")


def call(module: str, *words: str | Path, folder: Path) -> None:
    """Run a command of alto-ds in a folder, and end where it fails."""
    command = [sys.executable, "-m", module, *map(str, words)]
    subprocess.run(command, cwd=folder, check=True)


def read(path: Path, comparison: str) -> Iterable[dict[str, str]]:
    """Rows of a CSV, with the name of the comparison before them."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield {"comparison": comparison, **row}


def write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as CSV; a column that one of them lacks is empty there."""
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
