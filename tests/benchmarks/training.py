"""How much of a training step the optimizer takes: ALTO against AdamW, on two ranks.

A GPT-2 of 38M parameters, sequences of 128 tokens, one a micro batch: a short forward and backward
pass, so the shares are high ones. With offload the AdamW is DeepSpeedCPUAdam, without it torch's
fused one.
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

from tests.benchmarks.contenders import arguments, write

STEPS_OF_ACCUMULATION = {1: 5, 8: 3, 64: 1}
SEQUENCE = 128


def worker(report: str) -> None:
    """One rank of one optimizer and mode, named by environment variables."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from transformers import GPT2Config, GPT2LMHeadModel

    import alto_ds

    optimizer, offload = os.environ["OPTIMIZER"], os.environ["OFFLOAD"] == "1"
    cpu = os.environ["DEVICE"] == "cpu"
    if cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.manual_seed(1234)
    shape = {"n_positions": SEQUENCE, "n_embd": 512, "n_layer": 4, "n_head": 8}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    params = list(model.parameters())
    if optimizer == "AdamW":
        made: Any = (
            DeepSpeedCPUAdam(params, lr=1e-6)
            if offload
            else torch.optim.AdamW(params, lr=1e-6, fused=True)
        )
    else:
        states = {"state_dtype": "bf16"} if "bf16" in optimizer else {}
        made = alto_ds.ALTO(params, lr=1e-6, **states)  # type: ignore[arg-type]
    spent: list[float] = []
    made.register_step_pre_hook(lambda *_: spent.append(-time.perf_counter()))

    def end(*_: Any) -> None:
        if not cpu:
            torch.accelerator.synchronize()
        spent[-1] += time.perf_counter()

    made.register_step_post_hook(end)
    zero: dict[str, Any] = {"stage": 2}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=config)
    tokens = torch.randint(0, 50257, (1, SEQUENCE), device=engine.device)
    rows = []
    for accumulation, steps in ((1, 1), *STEPS_OF_ACCUMULATION.items()):  # the first warms up
        engine.set_train_batch_size(accumulation * dist.get_world_size())
        whole = []
        spent.clear()
        for _ in range(steps):
            start = time.perf_counter()
            for _ in range(accumulation):
                engine.backward(engine(input_ids=tokens, labels=tokens).loss)
                engine.step()
            whole.append(time.perf_counter() - start)
        share = statistics.median(o / w for o, w in zip(spent, whole, strict=True))
        rows.append(
            {
                "mode": "ZeRO-2, offload" if offload else "ZeRO-2",
                "accumulation": accumulation,
                "optimizer": optimizer,
                "optimizer, ms": statistics.median(spent) * 1e3,
                "step, s": statistics.median(whole),
                "share, %": 100 * share,
            }
        )
    if dist.get_rank() == 0:
        with open(report, "w") as file:
            json.dump(rows[1:], file)
    dist.destroy_process_group()


def main() -> None:
    options = arguments()
    cpu = options.device == "cpu"
    import torch

    ranks = 2 if cpu else torch.cuda.device_count()
    rows: list[dict[str, Any]] = []
    for offload in ("0", "1"):
        for optimizer in ("AdamW", "ALTO", "ALTO, bf16 states"):
            with tempfile.NamedTemporaryFile("r") as file:
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                call = [f"--nproc_per_node={ranks}", "-m", "tests.benchmarks.training", file.name]
                variables = {"OPTIMIZER": optimizer, "OFFLOAD": offload, "DEVICE": options.device}
                if cpu:
                    variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
                subprocess.run(
                    [*launch, *call],
                    env=os.environ | variables,
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                rows += json.load(file)
    rows.sort(key=lambda row: (row["mode"], row["accumulation"]))
    write(options.report, rows)


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        worker(arguments().report)
    else:
        main()
