"""Seconds to save and to resume GPT-2 124M on two ranks, with checksums, without, and by DeepSpeed.

ZeRO-1, fp32, files in the folder for temporary ones. Files are read while the machine still has
them in memory, as it has not after a new start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.benchmarks.contenders import arguments, gpt2_shapes, take_turns, write

TAG = "step1"


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Let manifests have sizes alone."""
    from alto_ds.checkpoint import deepspeed_files, manifest, saving

    def size_of(path: Path) -> manifest.Entry:
        return manifest.Entry(path.stat().st_size, 0)

    with contextlib.ExitStack() as stack:
        for module in (deepspeed_files, manifest, saving):
            stack.enter_context(mock.patch.object(module, "entry_of", size_of))
        yield


def make_engine() -> Any:
    """GPT-2's parameters, without its layers, after one step."""
    import deepspeed
    import torch

    import alto_ds

    class Parameters(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = torch.nn.ParameterList(torch.zeros(s) for s in gpt2_shapes("gpt2"))

        def forward(self) -> torch.Tensor:
            return sum(param.sum() for param in self.all)

    model = Parameters()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=alto_ds.ALTO(model.parameters()),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}},
    )
    engine.backward(engine())
    engine.step()
    return engine


def worker(report: str, repeats: int, folder: Path) -> None:
    """One rank."""
    import deepspeed
    import torch.distributed as dist

    from alto_ds.checkpoint import resume, save

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    engine = make_engine()
    own, plain, theirs = (folder / name for name in ("own", "plain", "theirs"))

    def save_plain() -> None:
        with without_checksums():
            save(engine, plain, TAG)

    def resume_plain() -> None:
        with without_checksums():
            resume(engine, plain)

    def clean() -> None:
        if dist.get_rank() == 0:
            for path in (own, plain, theirs):
                shutil.rmtree(path, ignore_errors=True)

    def together(action: Callable[[], Any]) -> Callable[[], None]:
        def act() -> None:
            action()
            dist.barrier()

        return act

    # What one has written is removed before the next writes: the disk is the same for all.
    actions: dict[str, Callable[[], Any]] = {
        "DeepSpeed's save_checkpoint": lambda: engine.save_checkpoint(str(theirs), TAG),
        "DeepSpeed's load_checkpoint": lambda: engine.load_checkpoint(str(theirs)),
        "clean 1": clean,
        "save without checksums": save_plain,
        "resume without checksums": resume_plain,
        "clean 2": clean,
        "save": lambda: save(engine, own, TAG),
        "resume": lambda: resume(engine, own),
        "clean 3": clean,
    }
    times = take_turns({name: together(action) for name, action in actions.items()}, repeats)
    rows = [
        {
            "what": name,
            "seconds": statistics.median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
        }
        for name, seconds in times.items()
        if not name.startswith("clean")
    ]
    if dist.get_rank() == 0:
        write(report, rows)
    dist.barrier()
    os._exit(0)  # in an orderly end PyTorch aborts now and then, in a thread of gloo


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        call = ["--nproc_per_node=2", "-m", "tests.benchmarks.checkpoints", options.report]
        subprocess.run(
            [*launch, *call, "--repeats", str(options.repeats)],
            env=os.environ
            | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CHECKPOINTS": folder},
            check=True,
            stdout=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        worker(arguments().report, arguments().repeats, Path(os.environ["CHECKPOINTS"]))
    else:
        main()
