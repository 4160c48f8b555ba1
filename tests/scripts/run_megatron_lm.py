"""Run a script of Megatron-LM, as it is, on CPU ranks, with ALTO or with its own optimizer.

    export PYTHONPATH=. TORCHDYNAMO_DISABLE=1
    torchrun --nproc_per_node 2 tests/scripts/run_megatron_lm.py --megatron \
        Megatron-LM/pretrain_gpt.py --alto-alpha -5 --distributed-backend gloo ...

What is replaced here is hardware that a CPU lacks: GPUs, and kernels compiled for them. At the end
rank 0 prints what ALTO has: a line ``ALTO {"groups": [[lr, weight_decay], ...], "layers": ...}``.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from alto_ds import ALTO, run
from tests.cuda_on_cpu import cuda_on_cpu


def replace_what_only_a_gpu_has() -> None:
    """More than megatron-core asks for: what Megatron-LM's training loop does."""
    cuda = torch.cuda
    for name, found in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (8, 0),
        "get_device_properties": SimpleNamespace(major=8, minor=0, name="CPU"),
        "Stream": cuda.current_stream(),
        "stream": contextlib.nullcontext(),
        "memory_stats": {},
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "empty_cache": None,
    }.items():
        setattr(cuda, name, lambda *_, found=found, **__: found)
    # Adam asks whether its steps are captured in a graph, where PyTorch was built for GPUs.
    no_graph = SimpleNamespace(is_capturing=lambda: False)
    torch.accelerator.current_stream = lambda *_: no_graph  # type: ignore[assignment]
    # It asks nvcc for its version; --transformer-impl local does not use the kernels in fp32.
    with contextlib.suppress(ModuleNotFoundError):  # newer versions have none
        kernels: Any = importlib.import_module("megatron.legacy.fused_kernels")
        kernels.load = lambda _: None
    # A warm-up of the GPU's kernels, which would draw from the CPU's random numbers here.
    initialize: Any = importlib.import_module("megatron.training.initialize")
    initialize._warmup_jit_function = lambda **_: None


def report() -> None:
    """Print the groups of the ALTO that has trained, and how many layers have a trust ratio."""
    for optimizer in gc.get_objects():
        if type(optimizer) is ALTO and optimizer.state:
            groups = [[group["lr"], group["weight_decay"]] for group in optimizer.param_groups]
            found = {"groups": groups, "layers": len(optimizer.trust_ratios())}
            print("ALTO", json.dumps(found), flush=True)


if __name__ == "__main__":
    with_alto = sys.argv[1] == "--megatron"
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1 + with_alto])))
    if with_alto and os.environ["RANK"] == "0":
        atexit.register(report)
    with cuda_on_cpu():
        replace_what_only_a_gpu_has()
        run.main()
