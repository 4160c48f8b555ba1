"""Run the benchmarks, print tables, and write all figures as JSON.

    python -m tests.benchmarks                      # all of them: 50 minutes on 2 cores
    python -m tests.benchmarks steps --model gpt2   # one

Each runs in a process of its own, on a machine that should have nothing else to do. The contenders
of a table take turns in one process; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = (
    *("startup", "steps", "memory", "growth", "collectives", "training", "checkpoints"),
    "plan",
    *("long_run", "loss", "throughput", "prepare"),
)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    found = {"cpu": f"{cpu}, {len(os.sched_getaffinity(0))} cores"}
    found["vectors"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "deepspeed", "timm", "e-optimizer-adaptor", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; numbers with three significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[text(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--model", choices=["gpt2", "gpt2-medium"], help="default: both")
    parser.add_argument("--repeats", type=int, default=15, help="of each median")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="benchmarks.json", help="file for the figures")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such benchmark; choose from {BENCHMARKS}")
    models = [arguments.model] if arguments.model else ["gpt2", "gpt2-medium"]

    report: dict[str, Any] = {"machine": machine()}
    print(json.dumps(report["machine"], indent=2))
    for name in arguments.names or BENCHMARKS:
        for model in models if name in ("steps", "memory") else [""]:
            with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
                options = ["--model", model] if model else []
                options += ["--repeats", str(arguments.repeats), "--device", arguments.device]
                command = [sys.executable, "-m", f"tests.benchmarks.{name}", file.name, *options]
                subprocess.run(command, check=True)
                rows = json.load(file)
            title = f"{name} {model}".strip()
            report[title] = rows
            print(f"\n## {title}\n\n{table(rows)}", flush=True)
            Path(arguments.output).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
