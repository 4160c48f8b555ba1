"""What the ranks of ZeRO send in one step, against two all-reduces for each parameter.

The latter is ColossalAI's scheme (``DistributedLamb``): the norms of each parameter's weights and
update are added up one by one. Here such all-reduces are sent over the same process group.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks.contenders import arguments, gpt2_shapes, write

MODEL = "gpt2"


def worker(report: str, repeats: int) -> None:
    """One rank: stages 1 to 3 on small layers, as many as GPT-2 has."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch import nn

    import alto_ds  # noqa: F401  registers the type

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    torch.set_num_threads(1)
    # Gradients are not what is measured: GPT-2's layers, each shrunk to 1/1000.
    sizes = [max(torch.Size(shape).numel() // 1000, 1) for shape in gpt2_shapes(MODEL)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])

        def forward(self) -> torch.Tensor:
            return torch.stack([layer.square().sum() for layer in self.layers]).sum()

    rows = []
    original = dist.all_reduce
    for stage in (1, 2, 3):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "ALTO", "params": {"lr": 1e-6}},
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
        }
        engine, *_ = deepspeed.initialize(
            model=(model := Model()), model_parameters=model.parameters(), config=config
        )
        sent: list[int] = []
        spent: list[float] = []

        def counted(tensor: Any, *rest: Any, sent: Any = sent, spent: Any = spent, **o: Any) -> Any:
            sent.append(tensor.numel() * tensor.element_size())
            start = time.perf_counter()
            work = original(tensor, *rest, **o)
            spent.append(time.perf_counter() - start)
            return work

        def begin(*_: Any, counted: Any = counted) -> None:
            dist.all_reduce = counted

        def end(*_: Any) -> None:
            dist.all_reduce = original

        engine.optimizer.optimizer.register_step_pre_hook(begin)
        engine.optimizer.optimizer.register_step_post_hook(end)
        for _ in range(repeats + 1):
            engine.backward(engine())
            engine.step()
        steps = repeats + 1
        norm = torch.ones(1)
        theirs = []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(2 * len(sizes)):
                dist.all_reduce(norm)
            theirs.append(time.perf_counter() - start)
        rows.append(
            {
                "ranks": dist.get_world_size(),
                "ZeRO": stage,
                "ALTO: collectives": len(sent) // steps,
                "bytes": sum(sent) // steps,
                "ms": statistics.median(spent or [0.0]) * 1e3,
                "two a parameter: collectives": 2 * len(sizes),
                "its bytes": 2 * len(sizes) * 4,
                "its ms": statistics.median(theirs) * 1e3,
            }
        )
        engine.destroy()
    if dist.get_rank() == 0:
        with open(report, "w") as file:
            json.dump(rows, file)
    dist.destroy_process_group()


def main() -> None:
    options = arguments()
    rows: list[dict[str, Any]] = []
    for ranks in (1, 2, 3, 4):
        with tempfile.NamedTemporaryFile("r") as file:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            call = [f"--nproc_per_node={ranks}", "-m", "tests.benchmarks.collectives"]
            subprocess.run(
                [*launch, *call, file.name, "--repeats", str(options.repeats)],
                env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            rows += json.load(file)
    write(options.report, rows)


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        worker(arguments().report, arguments().repeats)
    else:
        main()
