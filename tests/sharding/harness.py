"""Runs the cases of sharding on real ranks, all of one number of ranks in one launch.

A rank is ``python -m tests.sharding.harness FOLDER [NAME ...]`` under torchrun. It runs all cases
for its number of ranks, or only the named ones, and writes what it measured to
``FOLDER/RANK.jsonl``: a line ``[name, result]`` for each case. Tests read it by :func:`measured`.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch import Tensor
from torch.optim import Optimizer

from alto_ds import ALTO
from alto_ds.layout import Fragment, Layer, Layout, local
from tests import launcher

# In this order, for DeepSpeed and megatron-core leave global state behind: without them first,
# AutoTP and megatron-core last.
MODULES = ("shard_cases", "dtensor_cases", "checkpoint_cases")
MODULES_WITH_DEEPSPEED = (
    *("offload_cases", "nonfinite_cases", "zero_cases", "parallel_cases"),
    "tensor_parallel_cases",
)
LAST_MODULES = ("megatron_cases", "megatron_checkpoint_cases")
TIME_LIMIT = 600  # seconds; then a rank that hangs prints where, and ends


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a matrix.

    Attributes:
        measures: runs the case on this rank and returns what JSON can hold. It is called with
            the case and a folder that all ranks share. All ranks call it together.
        worlds: numbers of ranks to run on.
        needs: a package without which the case is skipped, as pip is told it.
        slow: run only where it is named.
    """

    measures: Callable[[Any, Path], dict[str, Any]]
    worlds: tuple[int, ...] = (4,)
    needs: str = "torch"
    slow: bool = False


def measured(world_size: int, name: str, *only: str) -> list[dict[str, Any]]:
    """What each rank measured for one case; all cases of ``world_size`` share one launch.

    Args:
        world_size: number of ranks.
        name: the case.
        only: all cases of the launch, where these are not all that are not slow.
    """
    ranks, status, output = launch(world_size, *only)
    assert status == 0, output  # a crash at the end of a rank says that something was wrong before
    for rank in ranks:
        assert name in rank, output
        if "missing" in rank[name]:
            pytest.skip(f"needs the package {rank[name]['missing']}")
        assert "error" not in rank[name], rank[name]["error"]
    return [rank[name] for rank in ranks]


@functools.cache
def launch(world_size: int, *only: str) -> tuple[list[dict[str, Any]], int, str]:
    """Results by rank and case, exit status, and the end of what the ranks printed."""
    with tempfile.TemporaryDirectory() as folder:
        status, printed = launcher.run_cases(
            world_size, "tests.sharding.harness", folder, *only, seconds=TIME_LIMIT + 60
        )
        reports = [Path(folder, f"{rank}.jsonl") for rank in range(world_size)]
        lines = [report.read_text().splitlines() if report.exists() else [] for report in reports]
        results = [dict(map(json.loads, rank)) for rank in lines]
        return results, status, printed


def cases(world_size: int, only: list[str]) -> dict[str, Case]:
    """The cases of a launch, in the order in which they run."""
    modules = list(MODULES)
    if is_installed("deepspeed"):
        modules += MODULES_WITH_DEEPSPEED
    modules += LAST_MODULES
    found: dict[str, Case] = {}
    for module in modules:
        table = importlib.import_module(f"tests.sharding.{module}").CASES
        assert found.keys().isdisjoint(table), f"{module}: the name of a case is taken"
        found |= table
    chosen = {
        name: case
        for name, case in found.items()
        if world_size in case.worlds and (name in only if only else not case.slow)
    }
    missing = [name for name in only if name not in chosen]
    assert not missing, f"there is no case {', '.join(missing)} on {world_size} rank(s)"
    return chosen


def main(folder: Path, only: list[str]) -> None:
    """Run the cases of this launch on this rank."""
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    torch.set_num_threads(1)
    backend = "gloo"
    if os.environ.get("SHARDING_DEVICE") == "cuda":  # one rank for each GPU
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    todo = cases(dist.get_world_size(), only)
    if "deepspeed" in sys.modules:
        prepare_deepspeed()
    gc.freeze()  # DeepSpeed collects garbage for each engine; do not look at modules each time
    folder.mkdir(exist_ok=True)
    # Of its own, for a case that fails may leave the others' group in disorder.
    agreement = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIME_LIMIT))
    spoiled = ""
    with open(folder / f"{dist.get_rank()}.jsonl", "w", buffering=1) as report:
        for name, case in todo.items():
            result = {"error": spoiled} if spoiled else run(case, folder)
            report.write(json.dumps([name, result]) + "\n")
            failed: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(failed, "error" in result, group=agreement)
            if any(failed) and not all(failed):
                # A collective that one rank has left would pair with one of the next case.
                spoiled = f"not run: {name} has failed on some ranks only"
    for child in multiprocessing.active_children():  # megatron-core's writers wait for more
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # in an orderly end PyTorch aborts now and then, in a thread of gloo


def run(case: Case, folder: Path) -> dict[str, Any]:
    """What a case measures, or its error."""
    if not is_installed(case.needs):
        return {"missing": case.needs}
    forget_process_groups()
    try:
        return case.measures(case, folder)
    except Exception:
        traceback.print_exc()
        return {"error": traceback.format_exc()}


def prepare_deepspeed() -> None:
    """Let DeepSpeed use the process group of this rank, and fp16 on any CPU."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    torch.optim.NaiveALTO = NaiveALTO  # type: ignore[attr-defined]
    # Compiling this op takes longer than all the cases; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    if not get_accelerator().is_fp16_supported():
        # A mock where hardware is missing: few CPUs have fp16 arithmetic, and DeepSpeed refuses
        # the rest, though PyTorch computes it on any.
        get_accelerator().is_fp16_supported = lambda: True


def is_installed(requirement: str) -> bool:
    """By what pip could be told: the name of a package, and maybe its versions."""
    wanted = Requirement(requirement)
    found = importlib.metadata.distributions(name=wanted.name)
    return any(wanted.specifier.contains(package.version) for package in found)


def forget_process_groups() -> None:
    """DeepSpeed gives the groups of one engine to the next: its mpu, AutoTP's mesh, ZeRO++'s."""
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups.mpu = groups.mesh_device = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


class NaiveALTO(ALTO):
    """What a layer-wise optimizer does that does not know how layers are cut.

    It takes each tensor of this rank for a layer: a flat tensor of ZeRO, or a part of a layer.
    """

    def _layout(self, group: dict[str, Any]) -> Layout:
        tensors = group["params"]
        return Layout(
            layers=tuple(Layer(t, f"tensor {i}") for i, t in enumerate(tensors)),
            fragments=tuple(
                Fragment(tensor=i, offset=0, length=length, start=0, layer=i, whole=True)
                for i, length in enumerate(local(tensor).numel() for tensor in tensors)
                if length
            ),
        )


class AllReduceCounter:
    """Notes the bytes of each ``torch.distributed.all_reduce`` in each ``optimizer.step()``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.calls: list[list[int]] = []  # for each step(), the bytes of each all-reduce
        self._all_reduce = dist.all_reduce
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self.calls.append([])
        dist.all_reduce = self._counted

    def _stop(self, *_: Any) -> None:
        dist.all_reduce = self._all_reduce

    def _counted(self, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        self.calls[-1].append(tensor.numel() * tensor.element_size())
        return self._all_reduce(tensor, *arguments, **options)


def bare(engine: Any) -> Any:
    """The optimizer inside DeepSpeed's wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer


def deviation(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ over the layers; infinite where one is NaN."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    worst = 0.0
    for name, right in expected.items():
        scale = right.double().norm().item()
        error = (found[name].double() - right.double()).norm().item()
        relative = error / scale if scale else error
        worst = max(worst, relative) if relative == relative else math.inf
    return worst


def ratio_deviation(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Largest relative difference of the trust ratios; infinite where one is missing or NaN."""
    if found.keys() != expected.keys():
        return math.inf
    errors = [abs(found[name].ratio / right.ratio - 1) for name, right in expected.items()]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


if __name__ == "__main__":
    # Not this module, which is "__main__": the modules of cases import the other.
    from tests.sharding import harness

    harness.main(Path(sys.argv[1]), sys.argv[2:])
