"""One run: an optimizer, its settings and a seed, from new weights to the last step."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR
from deepspeed.utils import logger
from torch import nn
from torch.optim import Optimizer

from alto_ds import ALTO
from alto_ds.compare.files import curve_file, ratios_file, result_file
from alto_ds.compare.hessian import Eigenvalue, largest_of_hessian
from alto_ds.compare.optimizers import make_optimizers
from alto_ds.compare.spec import Spec
from alto_ds.compare.task import Task
from alto_ds.compare.tasks import make_task
from alto_ds.files import replace_text
from alto_ds.pretrain.metrics import scaled_ratios

RATIOS = 20  # steps of a final run at which trust ratios are recorded, fewer in a shorter one


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What decides how all runs of a comparison end, besides its settings.

    Attributes:
        fingerprint: of the task: its model and data.
        device: "cpu", or the kind of accelerator.
        versions: of the packages that compute.
    """

    fingerprint: str
    device: str
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that decides how a run ends.

    Attributes:
        optimizer: its name in the comparison.
        type: see :data:`alto_ds.compare.optimizers.TYPES`.
        params: settings of the optimizer.
        stage: "search", which looks at validation text, or "final", which looks at test text, too.
        seed: of weights and order of the data.
        conditions: the same for all runs.
    """

    optimizer: str
    type: str
    params: Mapping[str, Any]
    stage: str
    seed: int
    conditions: Conditions

    def key(self, spec: Spec) -> str:
        """A name for its files, which changes with any setting that decides how it ends."""
        common = {
            "batch_size": spec.batch_size,
            "micro_batch_size": spec.micro,
            "steps": spec.total_steps,
            "schedule": dataclasses.asdict(spec.schedule),
            "gradient_clipping": spec.gradient_clipping,
        }
        if self.stage == "final" and spec.sharpness:
            common["sharpness"] = spec.sharpness
        setting = json.dumps(common | dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(setting.encode()).hexdigest()[:16]


class DivergedError(Exception):
    """Loss, gradient or weights are not finite any more."""


def finish(run: Run, spec: Spec, folder: Path) -> dict[str, Any]:
    """Do a run, and write its curve, trust ratios where it has them, and then its result.

    Args:
        run: what to do.
        spec: of the comparison.
        folder: its output folder, where the data is prepared.

    Returns:
        What is in the result's file: the run's optimizer, type, params, stage, seed and device;
        ``diverged``, why and at which step, or null; ``steps`` done; ``seconds`` of these steps,
        without evaluation; ``validation`` and, of final runs, ``test``: metrics by their names,
        null where the run has diverged; and of final runs that have not, where the comparison
        measures it, ``sharpness`` and ``sharpness_residual``.
    """
    logger.setLevel(logging.ERROR)  # the schedule warns of each first step
    device = run.conditions.device
    if device == "cpu":
        torch.set_num_threads(1)  # so that the sums do not depend on the machine
    task = make_task(spec.task, folder / "data")
    model = task.model(run.seed).to(device)
    rows: list[tuple[int, float, float]] = []
    ratios: list[tuple[int, str, float]] = []
    metrics: dict[str, Mapping[str, float] | None] = {"validation": None, "test": None}
    diverged = None
    try:
        _train(task, model, run, spec, rows, ratios)
        for part in ("validation", "test")[: 2 if run.stage == "final" else 1]:
            found = task.evaluate(model, part, spec.micro)
            if not all(map(math.isfinite, found.values())):
                raise DivergedError(f"{part} loss {found['loss']} after the last step")
            metrics[part] = found
    except DivergedError as error:
        diverged, metrics = str(error), {"validation": None, "test": None}
    key, each = run.key(spec), spec.batch_size * task.tokens_per_sequence
    lines = [f"{step},{step * each},{seconds:.4f},{loss!r}" for step, seconds, loss in rows]
    replace_text(curve_file(folder, key), "\n".join(["step,tokens,seconds,loss", *lines, ""]))
    if ratios:
        lines = [f"{step},{layer},{ratio!r}" for step, layer, ratio in ratios]
        replace_text(ratios_file(folder, key), "\n".join(["step,layer,ratio", *lines, ""]))
    result = {
        "optimizer": run.optimizer,
        "type": run.type,
        "params": dict(run.params),
        "stage": run.stage,
        "seed": run.seed,
        "device": device,
        "diverged": diverged,
        "steps": len(rows),
        "seconds": round(rows[-1][1], 2) if rows else 0.0,
        **metrics,
    }
    if spec.sharpness and run.stage == "final" and diverged is None:
        end = sharpness(task, model, run.seed, spec)
        result |= {"sharpness": end.value, "sharpness_residual": end.residual}
    replace_text(result_file(folder, key), json.dumps(result, indent=1) + "\n")
    return result


def sharpness(task: Task, model: nn.Module, seed: int, spec: Spec) -> Eigenvalue:
    """The largest eigenvalue of the Hessian of the loss over a seed's first training examples.

    They are the same for all batch sizes.
    """
    micro = math.gcd(spec.sharpness, spec.micro)
    count = spec.sharpness // micro
    batches = [*itertools.islice(task.batches(seed, spec.sharpness, micro), count)]
    model.eval()
    return largest_of_hessian(
        lambda: (task.loss(model, batch) / count for batch in batches),
        [*model.parameters()],
        torch.Generator().manual_seed(0),
    )


def _train(
    task: Task,
    model: nn.Module,
    run: Run,
    spec: Spec,
    rows: list[tuple[int, float, float]],
    ratios: list[tuple[int, str, float]],
) -> None:
    """Train to the last step; add each step, the seconds since the first, and its loss to rows.

    Of a final run add step, layer and trust ratio to ratios at some steps.

    Raises:
        DivergedError: a loss or a gradient is not finite.
    """
    optimizers = make_optimizers(run.type, run.params, task.parameters(model))
    schedules = [_schedule(optimizer, spec) for optimizer in optimizers]
    batches = task.batches(run.seed, spec.batch_size, spec.micro)
    accumulation = spec.batch_size // spec.micro
    clipping = spec.gradient_clipping or math.inf
    recorded = _recorded(spec.total_steps) if run.stage == "final" else ()
    began = time.perf_counter()
    for step in range(1, spec.total_steps + 1):
        torch.manual_seed(run.seed + step - 1)  # of dropout, as in the main job
        total = torch.zeros((), device=run.conditions.device)
        for _ in range(accumulation):
            part = task.loss(model, next(batches)) / accumulation
            part.backward()
            total += part.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clipping).item()
        loss = total.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(f"step {step}: loss {loss}, gradient norm {norm}")
        for optimizer in optimizers:
            _step(optimizer, step)
            scaling = getattr(optimizer, "optimizer", optimizer)  # E has its base inside
            if step in recorded and isinstance(scaling, ALTO):
                ratios += [(step, *of_layer) for of_layer in scaled_ratios(scaling, model).items()]
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        rows.append((step, time.perf_counter() - began, loss))


def _step(optimizer: Optimizer, step: int) -> None:
    try:
        optimizer.step()
    # Raised by ALTO and E of what is not finite, and by decompositions of such matrices.
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        raise DivergedError(f"step {step}: {' '.join(str(error).split())[:200]}") from None


def _recorded(steps: int) -> set[int]:
    """Steps that are evenly spread over a run, the last among them."""
    count = min(RATIOS, steps)
    return {steps * number // count for number in range(1, count + 1)}


def _schedule(optimizer: Optimizer, spec: Spec) -> WarmupCosineLR:
    return WarmupCosineLR(
        optimizer,
        total_num_steps=spec.total_steps,
        warmup_num_steps=warmup_steps(spec),
        cos_min_ratio=spec.schedule.floor,
    )


def warmup_steps(spec: Spec) -> int:
    """Of the schedule, at least one."""
    return max(round(spec.schedule.warmup * spec.total_steps), 1)
