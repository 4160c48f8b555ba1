"""With which settings does a run train? In a few lines, one for each part."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist

from alto_ds.pretrain.settings import Settings


def lines_of_settings(settings: Settings) -> list[str]:
    """The command's settings, with the defaults of those that were not given."""
    model = dataclasses.asdict(settings.model) | settings.model.architecture
    model["seq_length"] = settings.model.length
    data = {k: v for k, v in dataclasses.asdict(settings.data).items() if v not in (None, ())}
    run = dataclasses.asdict(settings.run) | {"max_steps": settings.steps}
    return [_line("model", model), _line("data", data), _line("run", run)]


def lines_of_engine(engine: Any) -> list[str]:
    """What DeepSpeed has made of its JSON.

    Args:
        engine: DeepSpeed's engine.

    Returns:
        Lines of the batch sizes, of precision and ZeRO, of the schedule, and one for each
        parameter group with its settings as the optimizer has them.
    """
    batches = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "ranks": dist.get_world_size(),
    }
    numbers = {
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "zero_optimization.stage": engine.zero_optimization_stage(),
        "gradient_clipping": engine.gradient_clipping(),
    }
    schedule = {"type": engine.scheduler_name(), **(engine.scheduler_params() or {})}
    schedule["lr"] = (engine.optimizer_params() or {}).get("lr")  # groups have the first step's
    optimizer = engine.basic_optimizer
    kind = type(optimizer).__name__
    if kind == "E":
        corrected = {"optimizer": type(optimizer.optimizer).__name__}
        corrected |= {"alpha": optimizer.alpha, "beta": optimizer.beta}
        kind += f" ({_pairs(corrected)})"
    groups = [
        _line(f"{kind}, group {number}", _settings_of(group))
        for number, group in enumerate(optimizer.param_groups)
    ]
    others = {"batches": batches, "numbers": numbers, "schedule": schedule}
    return [*(_line(title, values) for title, values in others.items()), *groups]


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    hidden = ("params", "param_names")
    return {key: value for key, value in group.items() if key not in hidden}


def _line(title: str, values: dict[str, Any]) -> str:
    return f"{title}: {_pairs(values)}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        if len(value) > 4:
            return f"[{_shown(value[0])}, ... {len(value)} in all]"
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)
