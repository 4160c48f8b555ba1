"""Engines of scripts that pass their own optimizer, beside engines that are passed ALTO or E.

usage: deepspeed --module alto_ds.run pass_own_optimizer.py FOLDER, where each rank writes what it
has found to FOLDER/RANK.json
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import init_distributed, initialize, ops
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR

import alto_ds

LR, WEIGHT_DECAY, STEPS = 0.02, 0.1, 6
# The script's lr and weight decay are to win over these.
ALTO: dict[str, Any] = {"lr": 7.0, "weight_decay": 0.7, "alpha": -4.0, "betas": [0.9, 0.8, 0.95]}
E: dict[str, Any] = {
    "optimizer": "AdamW",
    "lr": 7.0,
    "alpha": -4.0,
    "beta": 0.9,
    "betas": [0.8, 0.95],
}


def model() -> nn.Module:
    """Layers of which ZeRO cuts some on 2 ranks; the same at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 1))


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices, and biases without decay, with keys as Megatron's schedule wants them."""
    params = list(module.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "wd_mult": 1.0, "lr_mult": 1.0},
        {
            "params": [p for p in params if p.ndim == 1],
            "wd_mult": 0.0,
            "lr_mult": 0.5,
            "weight_decay": 0.0,
        },
    ]


def adam(params: Any) -> Optimizer:
    return torch.optim.Adam(params, lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.999))


def alto(params: Any) -> Optimizer:
    settings = {k: v for k, v in ALTO.items() if k not in ("lr", "weight_decay")}
    return alto_ds.ALTO(params, lr=LR, weight_decay=WEIGHT_DECAY, **settings)


def e_of_adamw(params: Any) -> Optimizer:
    base = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.8, 0.95))
    return alto_ds.E(base, alpha=-4.0, beta=0.9)


class LikeMegatrons:
    """A schedule as Megatron's: it writes learning rate and weight decay into the groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.step(0)

    def step(self, increment: int = 1) -> None:
        self.steps += increment
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min(1.0, self.steps / 3) * group["lr_mult"]
            group["weight_decay"] = WEIGHT_DECAY * (1 + self.steps) * group["wd_mult"]


def warm_up(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def cycle(optimizer: Optimizer) -> CyclicLR:
    return CyclicLR(optimizer, LR / 2, LR, cycle_momentum=True)


def config(stage: int, name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_batch_size": 16,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "optimizer": {"type": name, "params": params},
    }


def train(engine: Any) -> dict[str, Any]:
    """Some steps, and what is left: weights, losses, and the optimizer's groups at each step."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    targets, losses, written = inputs.sum(1, keepdim=True).sin(), [], []
    for _ in range(STEPS):
        loss = (engine(inputs) - targets).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        written.append([(g["lr"], g["weight_decay"]) for g in engine.basic_optimizer.param_groups])
    weights = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    return {"weights": weights.tolist(), "losses": losses, "written": written}


def run(
    make: Callable[[Any], Optimizer],
    settings: dict[str, Any],
    schedule: Callable[[Any], Any] | None = None,
    start: Callable[..., Any] = initialize,
    before: Callable[[nn.Module, Optimizer], None] = lambda *_: None,
    as_function: bool = False,
    by: str = "config",
) -> dict[str, Any]:
    """Train by an engine that is passed the optimizer of ``make``; all ranks call this together.

    Args:
        make: of parameter groups.
        settings: DeepSpeed's.
        schedule: of the optimizer that the script holds, not of the engine's.
        start: ``deepspeed.initialize``.
        before: is shown the model and the optimizer.
        as_function: pass a function that makes the optimizer.
        by: "config", "config_params" or "args", whichever carries the settings.
    """
    module = model()
    passed = make(groups(module))
    before(module, passed)
    scheduled = None if schedule is None else schedule(passed)
    carried: Any = settings
    if by == "args":
        path = Path(sys.argv[-1], f"config{dist.get_rank()}.json")
        path.write_text(json.dumps(settings))
        carried = Namespace(deepspeed_config=str(path), local_rank=int(os.environ["LOCAL_RANK"]))
    found: dict[str, Any] = {}
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        warnings.simplefilter("always")
        try:
            engine, *_ = start(
                model=module,
                optimizer=(lambda _: passed) if as_function else passed,
                lr_scheduler=scheduled,
                **{by: carried},
            )
            found = train(engine)
        except (RuntimeError, ValueError) as error:
            found["error"] = str(error)
    found["warned"] = [str(w.message) for w in warned if w.category is UserWarning]
    found["said"] = [line for line in said.getvalue().splitlines() if "alto_ds" in line]
    if "error" not in found:
        used = engine.basic_optimizer
        found["optimizer"] = type(used).__name__
        found["is passed"] = used is passed
        found["same dicts"] = [
            ours is its for ours, its in zip(used.param_groups, passed.param_groups, strict=True)
        ]
        found["keys"] = sorted(used.param_groups[0])
        if isinstance(used, alto_ds.ALTO):
            ratios = used.trust_ratios(engine.module.named_parameters())
            found["scaled"] = sorted(name for name, ratio in ratios.items() if ratio.scaled)
            found["settings"] = [used.param_groups[0]["alpha"], used.param_groups[0]["betas"]]
    return found


def has_stepped(module: nn.Module, optimizer: Optimizer) -> None:
    module(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    init_distributed()
    torch.set_num_threads(1)
    original = initialize.__wrapped__
    adamw = {"lr": LR}
    auto = {"alpha": "auto", "betas": "auto"}
    without_size = config(1, "ALTO", auto) | {"train_micro_batch_size_per_gpu": 8}
    del without_size["train_batch_size"]
    found = {
        # What the script's optimizer becomes, and the same passed directly.
        "zero1": run(adam, config(1, "ALTO", ALTO), warm_up),
        "zero1 directly": run(alto, config(1, "Adam", adamw), warm_up),
        "zero2": run(adam, config(2, "ALTO", ALTO), LikeMegatrons),
        "zero2 directly": run(alto, config(2, "Adam", adamw), LikeMegatrons),
        "E": run(adam, config(2, "E", E), LikeMegatrons),
        "E directly": run(e_of_adamw, config(2, "Adam", adamw), LikeMegatrons),
        "function": run(adam, config(1, "ALTO", ALTO), as_function=True),
        "function directly": run(alto, config(1, "Adam", adamw)),
        # Other ways to give the settings.
        "args": run(adam, config(1, "ALTO", ALTO), warm_up, by="args"),
        "config_params": run(adam, config(1, "ALTO", ALTO), warm_up, by="config_params"),
        "auto": run(adam, config(1, "ALTO", auto)),
        # What is not replaced.
        "other": run(adam, config(1, "AdamW", adamw)),
        "own": run(alto, config(1, "ALTO", ALTO), warm_up),
        "imported": run(adam, config(1, "ALTO", ALTO), start=original),
        "imported, E": run(adam, config(2, "E", E), start=original),
        "imported, own": run(alto, config(1, "ALTO", ALTO), start=original),
        "imported, other": run(adam, config(1, "AdamW", adamw), start=original),
        # What is refused.
        "states": run(adam, config(1, "ALTO", ALTO), before=has_stepped),
        "states, function": run(
            adam, config(1, "ALTO", ALTO), before=has_stepped, as_function=True
        ),
        "momentum": run(adam, config(1, "ALTO", ALTO), cycle),
        "auto without a size": run(adam, without_size),
    }
    Path(sys.argv[-1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    # Not in an orderly way: Python may exit while a thread of gloo still frees the last gathered
    # tensors, and PyTorch aborts.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


main()
