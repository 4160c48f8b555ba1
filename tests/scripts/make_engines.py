"""DeepSpeed's engine from each of some JSON files, with a tiny model, on one rank.

usage: make_engines.py JSON...
"""

import json
import sys
import time
from typing import Any

import deepspeed
import torch

import alto_ds  # noqa: F401  registers the optimizer types

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")


def made_of(path: str) -> dict[str, Any]:
    """What DeepSpeed has made of a JSON."""
    start = time.perf_counter()
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    engine, _, _, schedule = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=path
    )
    optimizer = engine.basic_optimizer
    group = optimizer.param_groups[0]
    return {
        "optimizer": type(optimizer).__name__,
        "alpha": group.get("alpha", getattr(optimizer, "alpha", None)),
        "betas": group["betas"],
        "schedule": type(schedule).__name__,
        "batch": engine.train_batch_size(),
        "micro batch": engine.train_micro_batch_size_per_gpu(),
        "clipping": engine.gradient_clipping(),
        "bf16": engine.bfloat16_enabled(),
        "stage": engine.zero_optimization_stage(),
        "offload": engine.zero_use_cpu_optimizer(),
        "seconds": time.perf_counter() - start,
    }


for path in sys.argv[1:]:
    print("RESULT " + json.dumps(made_of(path)), flush=True)
torch.distributed.destroy_process_group()
