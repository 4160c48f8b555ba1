"""Where else can a run be watched? In TensorBoard, and by DeepSpeed's monitors: CSV, W&B, Comet.

They are set in DeepSpeed's JSON, in its sections ``tensorboard``, ``csv_monitor``, ``wandb`` and
``comet``. Files go to the run's folder where a section names no other. TensorBoard is on where it
is installed, unless its section says otherwise.
"""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from deepspeed.monitor.config import TensorBoardConfig, get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from alto_ds.files import replacing

# Sections of DeepSpeed's JSON, and the package that each needs.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
SECTIONS = (*PACKAGES, "csv_monitor")
# What the numbers of a step are called where they are watched.
TAGS = {
    "loss": "train/loss",
    "ppl": "train/perplexity",
    "lr": "train/learning_rate",
    "grad_norm": "train/gradient_norm",
    "loss_scale": "train/loss_scale",
    "tokens_per_second": "speed/tokens_per_second",
    "tflops": "speed/tflops",
    "mfu": "speed/mfu",
    "memory_gib": "memory/peak_gib",
    "val_loss": "held_out/loss",
    "val_ppl": "held_out/perplexity",
    "trust_ratio_min": "trust_ratio/min",
    "trust_ratio_median": "trust_ratio/median",
    "trust_ratio_max": "trust_ratio/max",
    "layers_scaled": "trust_ratio/layers_scaled",
}


def check_installed(config: Mapping[str, Any]) -> None:
    """Refuse monitors whose package is not there.

    Args:
        config: DeepSpeed's JSON.

    Raises:
        ValueError: naming section and package.
    """
    for section, package in PACKAGES.items():
        if config.get(section, {}).get("enabled") and not _is_installed(package):
            raise ValueError(
                f"{section}.enabled=true needs the package {package}; pip install {package}, or "
                "write false"
            )


class Monitors:
    """Written by rank 0, which alone has one.

    A resumed run goes on in the same folders. What they tell of steps after the checkpoint is
    taken out: those steps are done again. So two runs must not name the same ``output_path`` and
    ``job_name``. W&B goes on with the same run where WANDB_RUN_ID names it and WANDB_RESUME is
    "allow".

    Args:
        config: DeepSpeed's JSON.
        folder: of the run.
        first_step: number of steps that were done before.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path, first_step: int) -> None:
        files = {"output_path": str(folder)}
        tensorboard = TensorBoardConfig(
            **{"enabled": _is_installed("tensorboard"), "job_name": "tensorboard"}
            | files
            | config.get("tensorboard", {})
        )
        self._tensorboard = None
        if tensorboard.enabled:
            # DeepSpeed's own writer knows of no steps that are done again.
            from torch.utils.tensorboard import SummaryWriter

            path = Path(tensorboard.output_path, tensorboard.job_name)
            self._tensorboard = SummaryWriter(str(path), purge_step=first_step + 1)
        others = {name: config.get(name, {}) for name in SECTIONS if name != "tensorboard"}
        others["csv_monitor"] = files | {"job_name": "csv"} | others["csv_monitor"]
        self._others = MonitorMaster(get_monitor_config(others))
        if self._others.csv_monitor is not None:
            _go_on(self._others.csv_monitor, first_step)

    def step(self, row: Mapping[str, Any]) -> None:
        """Record one training step.

        Args:
            row: a line of ``metrics.jsonl``: see :data:`TAGS`. ``trust_ratios`` has one for each
                layer, by the layer's name; TensorBoard shows them as a histogram, too.
        """
        events = {tag: row[name] for name, tag in TAGS.items() if name in row}
        ratios = row.get("trust_ratios", {})
        events |= {f"trust_ratio_of/{layer}": ratio for layer, ratio in ratios.items()}
        step = row["step"]
        self._others.write_events([(tag, value, step) for tag, value in events.items()])
        if self._tensorboard is None:
            return
        for tag, value in events.items():
            self._tensorboard.add_scalar(tag, value, step)
        finite = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
        if finite:
            self._tensorboard.add_histogram("trust_ratio/layers", np.array(finite), step)
        self._tensorboard.flush()  # nothing of a step is missing after a checkpoint of it

    def close(self) -> None:
        """End the files."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _go_on(monitor: Any, first_step: int) -> None:
    """Let DeepSpeed's CSV monitor go on in its files, without steps that are done again.

    Alone it would write another heading into each file and leave those steps.
    """
    for path in Path(monitor.log_dir).glob("*.csv"):
        with path.open(newline="") as file:
            heading, *rows = list(csv.reader(file)) or [["step", path.stem]]
        # A line that was cut off, where the run was killed, has fewer cells.
        kept = [row for row in rows if len(row) == 2 and int(row[0]) <= first_step]
        with replacing(path) as new, new.open("w", newline="") as file:
            csv.writer(file).writerows([heading, *kept])
        monitor.filenames.append(path.stem)
