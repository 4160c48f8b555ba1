"""One rank of runs of the main job's engine: what each holds, sends and needs.

``torchrun … measure_runs.py REPORT CASES``: both are JSON, the cases a list of objects with
``config`` for DeepSpeed and ``model`` for :class:`~alto_ds.pretrain.settings.ModelSettings`.
Rank 0 writes to REPORT a list with, for each case, what each rank has found.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from alto_ds.plan.activations import Vocabulary
from alto_ds.pretrain import setup
from alto_ds.pretrain.ranks import init_distributed
from alto_ds.pretrain.settings import DataSettings, ModelSettings, RunSettings, Settings

VOCABULARY = 1000
STEPS = 3  # ZeRO-3 learns in the first one which layers it needs when
# Place of the larger tensor among a collective's arguments.
COLLECTIVES = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}
# Of these DeepSpeed should use none here.
OTHERS = {"all_gather": 0, "reduce_scatter": 1, "reduce": 0, "broadcast": 0}


def main() -> None:
    report, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    sent: Counter[str] = Counter()
    for name, place in (COLLECTIVES | OTHERS).items():
        setattr(dist, name, counted(name, place, sent))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    init_distributed(timedelta(seconds=120))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = []
    for case in cases:
        here = measured(case, sent)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, here)
        found.append(ranks)
    if dist.get_rank() == 0:
        report.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def counted(name: str, place: int, sent: Counter[str]) -> Callable[..., Any]:
    """The collective, which adds the bytes of its larger tensor to ``sent``."""
    original = getattr(dist, name)

    @functools.wraps(original)
    def call(*args: Any, **named: Any) -> Any:
        given = [*args, *named.values()][place]
        sent[name] += sum(map(bytes_of, given if isinstance(given, list) else [given]))
        return original(*args, **named)

    return call


def measured(case: dict[str, Any], sent: Counter[str]) -> dict[str, Any]:
    """What one rank finds; all ranks call this together."""
    settings = Settings(
        model=ModelSettings(**case["model"], compile=False),
        data=DataSettings(),
        run=RunSettings(output_dir=Path("never_made"), max_steps=STEPS),
        deepspeed_config=case["config"],
    )
    gc.collect()
    before = psutil.Process().memory_info().rss
    engine = setup.make_engine(settings, Vocabulary(case.get("vocab_size", VOCABULARY)))
    optimizer = engine.optimizer.optimizer
    pieces: set[tuple[str, int, int]] = set()

    def look(*_: Any) -> None:
        for group in optimizer.param_groups:
            layout = optimizer._layout(group)
            pieces.update(
                (layout.layers[f.layer].name, f.start, f.length) for f in layout.fragments
            )

    hook = optimizer.register_step_pre_hook(look)
    tokens = torch.zeros(
        engine.train_micro_batch_size_per_gpu(), settings.model.length, dtype=torch.int64
    )
    for _ in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        sent.clear()
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(tokens, tokens))
            engine.step()
    at_most = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    sent_in_a_step = dict(sent)
    hook.remove()
    states: Counter[str] = Counter()
    for state in optimizer.state.values():
        states.update({k: bytes_of(v) for k, v in state.items() if isinstance(v, Tensor)})
    zero = engine.optimizer
    masters = (
        zero.fp32_partitioned_groups_flat
        if engine.zero_optimization_stage() == 3
        else zero.single_partition_of_fp32_groups
    )
    engine.destroy()
    return {
        "elements": sum(tensor.numel() for tensor in masters),
        "states": states,
        "pieces": sorted(pieces),
        "sent": sent_in_a_step,
        "peak": at_most - before,
    }


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
