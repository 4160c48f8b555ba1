"""Megatron-DeepSpeed's own pretrain_gpt.py on CPU ranks, and what its engine has trained.

usage: run_megatron_deepspeed.py CLONE REPORT MODE ARGUMENTS..., where CLONE is a clone of
deepspeedai/Megatron-DeepSpeed, ARGUMENTS are those of pretrain_gpt.py, and MODE is one of

- unchanged: nothing but the stubs below; run it by ``alto_ds.run``
- passes-alto: the reference: Megatron passes ALTO itself in place of Adam
- passes-alto-undecayed: the same, with no weight decay in any group

Rank 0 writes to REPORT, for ``torch.load``, what :func:`report` says.

The repository does not start with DeepSpeed 0.19.8, so two modules that training GPT does not use
are stubs: ``deepspeed.compression.compress``, which is gone, and one that wants torchvision.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from types import ModuleType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

import alto_ds

ALTO: dict[str, Any] = {"alpha": -5.0, "betas": (0.99, 0.9, 0.99)}


def install_stubs() -> None:
    """Put modules of None in place of those that cannot be imported; training GPT calls neither."""
    for name, functions in {
        "deepspeed.compression.compress": ("init_compression", "redundancy_clean"),
        "megatron.model.vision.knn_monitor": ("compute_feature_bank",),
    }.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(functions))


def pass_alto(undecayed: bool) -> None:
    """Let Megatron make and pass ALTO where it makes Adam."""

    def make(groups: list[dict[str, Any]], lr: float, weight_decay: float, **_: Any) -> Any:
        for group in groups:
            group["wd_mult"] *= not undecayed
        return alto_ds.ALTO(groups, lr=lr, weight_decay=weight_decay, **ALTO)

    optimizers: Any = importlib.import_module("megatron.optimizer")
    optimizers.Adam = make


def watch(engines: list[Any], written: list[list[tuple[str, float, float]]]) -> None:
    """Keep the engine that is made, and note its optimizer's settings at each step."""
    make_engine = deepspeed.initialize

    def initialize(**given: Any) -> Any:
        made = make_engine(**given)
        engines.append(made[0])
        groups = list(made[0].basic_optimizer.param_groups)

        def note(optimizer: Any, *_: Any) -> None:
            if optimizer.param_groups[0] is groups[0]:  # ZeRO 1 and 2 call for each group
                written.append([(g["name"], g["lr"], g["weight_decay"]) for g in groups])

        made[0].basic_optimizer.register_step_pre_hook(note)
        return made

    deepspeed.initialize = initialize


def report(engine: Any, written: list[list[tuple[str, float, float]]]) -> dict[str, Any]:
    """What the engine has trained; all ranks call this together.

    Returns:
        ``optimizer`` and ``wrapper``: names of classes; ``weights``: the fp32 weights by name;
        ``trust_ratios``: (ratio, scaled) by name; ``written``: for each step (name, learning
        rate, weight decay) of each parameter group.
    """
    named = list(engine.module.named_parameters())
    used = engine.basic_optimizer
    weights = {name: safe_get_full_fp32_param(param) for name, param in named}
    return {
        "optimizer": type(used).__name__,
        "wrapper": type(engine.optimizer).__name__,
        # Without ZeRO the parameters are the fp32 weights.
        "weights": {n: (p if weights[n] is None else weights[n]).detach() for n, p in named},
        "trust_ratios": {n: (r.ratio, r.scaled) for n, r in used.trust_ratios(named).items()},
        "written": written,
    }


def main() -> None:
    launcher = [a for a in sys.argv[1:] if a.startswith("--local_rank")]
    clone, path, mode, *arguments = [a for a in sys.argv[1:] if a not in launcher]
    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]  # the number of DeepSpeed's CPU devices
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    install_stubs()
    sys.path.insert(0, clone)
    script = os.path.join(clone, "pretrain_gpt.py")
    sys.argv = [script, *launcher, *arguments]
    if mode != "unchanged":
        pass_alto(undecayed=mode == "passes-alto-undecayed")
    engines: list[Any] = []
    written: list[list[tuple[str, float, float]]] = []
    watch(engines, written)
    runpy.run_path(script, run_name="__main__")
    found = report(engines[0], written)
    if dist.get_rank() == 0:
        torch.save(found, path)
    # Not in an orderly way: Python may exit while a thread of gloo still frees the last gathered
    # tensors, and PyTorch aborts.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


main()
