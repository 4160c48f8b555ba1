"""Ranks that write checkpoints, or load them and go on: ``ranks.py WORK FOLDER NAME ...``.

Each writes what it saw, by the name of the pair, to ``FOLDER/WORK-RANKS-RANK.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import gc
import io
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

import alto_ds  # noqa: F401  registers the optimizer types
from alto_ds import checkpoint
from tests.resizing.cases import PAIRS, SAVED, STEPS, Pair, Side
from tests.resizing.llama import Llama
from tests.sharding.harness import bare, deviation, forget_process_groups
from tests.sharding.linear_model import LinearModel
from tests.sharding.pieces import assemble, pieces_of

TIME_LIMIT = 300  # seconds
MASTER = "masters"


def make_engine(pair: Pair, side: Side, **more: Any) -> Any:
    """An engine for one side; weights are others than the source's where it loads."""
    params = {key: value for key, value in pair.optimizer.items() if key != "llama"}
    config = {
        "train_micro_batch_size_per_gpu": pair.batch * side.tensor_parallel // side.ranks,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": pair.kind, "params": params},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_num_steps": 2,
                "total_num_steps": 50,
                "warmup_max_lr": [0.05, 0.01, 0.05],
            },
        },
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": side.stage, **side.zero},
        **copy.deepcopy(side.precision),
        **more,
    }
    if side.tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": side.tensor_parallel}
    model: Any = Llama() if pair.is_llama else LinearModel()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.groups(), config=config)
    return engine


def train(engine: Any, pair: Pair, side: Side, steps: range) -> None:
    """Optimizer steps on global batches that depend on the number of the step alone."""
    shares = side.ranks // side.tensor_parallel
    size, share = pair.batch // shares, dist.get_rank() // side.tensor_parallel
    for step in steps:
        first = step * pair.batch + share * size
        engine.backward(engine(range(first, first + size)))
        engine.step()


def held(engine: Any, pair: Pair) -> dict[str, dict[str, Tensor]]:
    """All that the optimizer has: weights and states of whole layers, on all ranks."""
    if pair.is_llama:
        return engine.module.held(engine)
    optimizer = bare(engine)
    pieces = pieces_of(engine, optimizer)
    values: dict[str, dict[Tensor, Tensor]] = {MASTER: {t: t.detach().flatten() for t in pieces}}
    for tensor in pieces:
        for key, value in optimizer.state[tensor].items():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                values.setdefault(key, {})[tensor] = value.flatten()
    sharded = engine.optimizer is not optimizer and not hasattr(engine.optimizer, "fp32_groups")
    found = assemble(values, pieces, sharded)
    found[MASTER].pop("frozen", None)  # at stage 0 the optimizer has it, too
    return found


def rest(engine: Any) -> dict[str, Any]:
    """What is of no layer: settings of the groups, steps, counters, rates, the loss scale."""
    groups = bare(engine).param_groups
    hidden = ("params", "param_names")
    states = bare(engine).state.values()
    return {
        "groups": [{k: v for k, v in group.items() if k not in hidden} for group in groups],
        "steps": sorted({int(state["step"]) for state in states if "step" in state}),
        "counters": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        "schedule": engine.lr_scheduler.state_dict(),
        "scale": engine.optimizer.cur_scale if engine.fp16_enabled() else None,
    }


def model_of(engine: Any) -> dict[str, Tensor]:
    """Whole parameters and buffers of the model."""
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().clone()
    return found | {name: buffer.clone() for name, buffer in engine.module.named_buffers()}


def save(pair: Pair, folder: Path) -> None:
    """Train, save and train on."""
    engine = make_engine(pair, pair.source)
    train(engine, pair, pair.source, range(SAVED))
    checkpoint.save(engine, folder / "checkpoints", f"step{SAVED}", {"step": SAVED})
    truth = {"saved": held(engine, pair), "rest": rest(engine)}
    truth["model"] = {} if pair.is_llama else model_of(engine)
    train(engine, pair, pair.source, range(SAVED, SAVED + STEPS))
    truth["end"] = held(engine, pair)
    if dist.get_rank() == 0:
        torch.save(truth, folder / "truth.pt")
    engine.destroy()


def load(pair: Pair, folder: Path) -> dict[str, Any]:
    """Load what was converted, and train on beside what the source has become."""
    truth = torch.load(folder / "truth.pt", weights_only=False)
    engine = make_engine(pair, pair.target)
    with torch.no_grad():
        for param in engine.module.parameters():  # so that nothing is right by chance
            param.data.fill_(7.0)
    resumed = checkpoint.resume(engine, folder / "checkpoints")
    assert resumed is not None
    result = compared(engine, pair, truth)
    result |= {"client_step": resumed.client_state["step"]}
    engine.destroy()
    return result


def compared(engine: Any, pair: Pair, truth: dict[str, Any]) -> dict[str, Any]:
    """How an engine that was loaded differs from the truth, at once and after ``STEPS``."""
    found = held(engine, pair)
    result: dict[str, Any] = {
        "keys": [sorted(found), sorted(truth["saved"])],
        "inexact": differing(found, truth["saved"]),
        "rest": {
            k: [v, truth["rest"][k]] for k, v in rest(engine).items() if v != truth["rest"][k]
        },
    }
    if not pair.is_llama:
        model = model_of(engine)
        masters = {name: found[MASTER].get(name, model[name]) for name in model}
        masters |= {"frozen": truth["model"]["frozen"]}
        result["model"] = [
            n for n, v in model.items() if not torch.equal(v, masters[n].to(v.dtype))
        ]
    train(engine, pair, pair.target, range(SAVED, SAVED + STEPS))
    end = held(engine, pair)
    result["moved"] = deviation(end[MASTER], found[MASTER])
    result["deviation"] = {
        key: deviation(end[key], truth["end"][key]) for key in end.keys() & truth["end"].keys()
    }
    return result


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of the layers and states that differ in a bit."""
    return [
        f"{key} of {name}"
        for key in found.keys() & expected.keys()
        for name, value in expected[key].items()
        if name not in found[key]
        or found[key][name].dtype != value.dtype
        or not torch.equal(found[key][name], value)
    ]


def load_by_deepspeed(pair: Pair, folder: Path) -> dict[str, Any]:
    """The same by DeepSpeed's converter and loader alone."""
    truth = torch.load(folder / "truth.pt", weights_only=False)
    converted = folder / f"deepspeed-{pair.target}"
    problem = [""]
    if dist.get_rank() == 0:
        arguments = argparse.Namespace(
            input_folder=str(folder / f"checkpoints/step{SAVED}"),
            output_folder=str(converted / "step"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                ds_to_universal.main(arguments)
        except Exception as error:
            problem = [f"converter: {type(error).__name__} {error}"]
    dist.broadcast_object_list(problem)
    if problem[0]:
        return {"error": problem[0]}
    engine = make_engine(pair, pair.target, checkpoint={"load_universal": True})
    try:
        engine.load_checkpoint(str(converted), tag="step")
    except Exception as error:
        return {"error": f"loader: {type(error).__name__} {error}"}
    found, others = held(engine, pair), rest(engine)
    lost = truth["saved"].keys() - found.keys()
    wrong = {name.split(" of ")[0] for name in differing(found, truth["saved"])}
    wrong |= {key for key, was in truth["rest"].items() if others[key] != was}
    return {"lost": sorted(lost), "wrong": sorted(wrong)}


WORK = {"save": save, "load": load, "deepspeed": load_by_deepspeed}


def main(kind: str, folder: Path, names: list[str]) -> None:
    """Do one kind of work for the named pairs on this rank."""
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's own loader fails on some ranks, and the others wait for them.
    seconds = 10 if kind == "deepspeed" else 60
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=seconds))
    from deepspeed.accelerator import get_accelerator

    # A mock where hardware is missing: few CPUs have fp16 arithmetic.
    get_accelerator().is_fp16_supported = lambda: True
    gc.freeze()
    results: dict[str, Any] = {}
    for name in names:
        forget_process_groups()
        pair = PAIRS[name]
        place = folder / pair.source_name
        place.mkdir(exist_ok=True)
        try:
            results[name] = WORK[kind](pair, place)
        except Exception:
            traceback.print_exc()
            results[name] = {"error": traceback.format_exc()}
        path = folder / f"{kind}-{dist.get_world_size()}-{dist.get_rank()}.json"
        path.write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
