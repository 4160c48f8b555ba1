"""Two real ranks that save, damage and resume checkpoints of DeepSpeed's engines.

A rank is ``python -m tests.faults.harness FOLDER [NAME ...]`` under torchrun. It runs all cases of
:mod:`tests.faults.cases`, or the named ones, and writes what it saw to ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import alto_ds  # noqa: F401  registers the optimizer type
from alto_ds.checkpoint import CheckpointError, Resumed, resume, save
from tests import launcher

TIME_LIMIT = 300  # seconds


@functools.cache
def launch() -> tuple[list[dict[str, Any]], int, str]:
    """What each rank saw, by case, the exit status and the end of what they printed."""
    with tempfile.TemporaryDirectory() as folder:
        module = "tests.faults.harness"
        status, printed = launcher.run_cases(2, module, folder, seconds=TIME_LIMIT + 60)
        reports = [Path(folder, f"{rank}.json") for rank in range(2)]
        ranks = [json.loads(path.read_text()) if path.exists() else {} for path in reports]
        return ranks, status, printed


def seen(name: str) -> list[Any]:
    """What each rank saw in one case."""
    ranks, status, output = launch()
    assert status == 0, output
    results = [rank[name] for rank in ranks]
    for result in results:
        if isinstance(result, dict) and "not permitted" in result:
            pytest.skip(result["not permitted"])
        assert not (isinstance(result, dict) and "error" in result), result["error"] + output
    return results


def main(folder: Path, only: list[str]) -> None:
    """Run the cases on this rank."""
    from tests.faults.cases import CASES

    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=60))
    gc.freeze()  # DeepSpeed collects garbage for each engine; do not look at modules each time
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if only and name not in only:
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            results[name] = case(folder / name)
        except Exception:
            traceback.print_exc()
            results[name] = {"error": traceback.format_exc()}
        dist.barrier()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # in an orderly end PyTorch aborts now and then, in a thread of gloo


@contextlib.contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """A process group of this process alone, which meets in a file in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        patch.setattr(deepspeed.utils.groups, "_WORLD_GROUP", None)  # of the module before
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="gloo")
        yield
        dist.destroy_process_group()


def make_engine(stage: int, **config: Any) -> Any:
    """A small model in DeepSpeed's engine, always the same."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 3))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_batch_size": 4,
            "optimizer": {"type": "ALTO", "params": {"lr": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            "zero_optimization": {"stage": stage},
            **config,
        },
    )
    return engine


def train_step(engine: Any, step: int) -> None:
    """One step on samples that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    samples = torch.randn(2, 40, generator=generator)
    engine.backward(engine(samples).square().mean())
    engine.step()


def save_steps(engine: Any, folder: Path, steps: range, **options: Any) -> list[list[Tensor]]:
    """Train and save after each step; what the engine was at each."""
    found = []
    for step in steps:
        train_step(engine, step)
        save(engine, folder, f"step{step}", {"step": step}, **options)
        found.append(snapshot(engine))
    return found


def snapshot(engine: Any) -> list[Tensor]:
    """All that this rank has of weights, master weights and states."""
    params = [getattr(param, "ds_tensor", param) for param in engine.module.parameters()]
    return [t.detach().clone() for t in tensors_in([params, engine.optimizer.state_dict()])]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in lists and dictionaries, in their order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two snapshots are the same to the bit.

    NaN equals itself: ZeRO-3's padding is uninitialised memory.
    """
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))
        for a, b in zip(left, right, strict=True)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def try_resume(engine: Any, folder: Path) -> tuple[Resumed | None, str, str]:
    """What was resumed, the error of it, and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            return resume(engine, folder), "", said.getvalue()
        except CheckpointError as error:
            return None, str(error), said.getvalue()


def error_of_save(engine: Any, folder: Path, tag: str, **options: Any) -> str:
    """The error of saving, empty where there is none."""
    try:
        save(engine, folder, tag, **options)
    except (CheckpointError, ValueError) as error:
        return str(error)
    return ""


@contextlib.contextmanager
def first_rank() -> Iterator[bool]:
    """Whether this is rank 0, which does something to files while the others wait."""
    dist.barrier()
    try:
        yield dist.get_rank() == 0
    finally:
        dist.barrier()


if __name__ == "__main__":
    # Not this module, which is "__main__": the module of cases imports the other.
    from tests.faults import harness

    harness.main(Path(sys.argv[1]), sys.argv[2:])
