"""One rank of what DeepSpeed moves out of an accelerator's memory; run by torchrun.

The same model trains with and without ZeRO-Infinity's NVMe, and with its states moved away and
back by ``engine.offload_states()``. Rank 0 writes how much of it differs, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_states import offload_optimizer_states
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

import alto_ds  # noqa: F401  registers the optimizer

WIDTH, BATCH, STEPS = 1024, 8, 4
STATES = ("exp_avg_grad", "exp_avg", "exp_avg_sq")
# A sub-group for each parameter. DeepSpeed swaps tensors of 1 MiB and more: both matrices.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1}


def nvme(buffer_count: int = 5) -> dict[str, Any]:
    """ZeRO-3 with the optimizer's states in files of the report's folder."""
    folder = os.path.dirname(os.path.abspath(sys.argv[1]))
    device = {"device": "nvme", "nvme_path": folder, "buffer_count": buffer_count}
    return ZERO3 | {"offload_optimizer": device}


def train(
    zero: dict[str, Any],
    after_step: Callable[[Any, int], None] | None = None,
    state_dtype: str = "fp32",
) -> Any:
    """A trained engine."""
    torch.manual_seed(1234)
    model = nn.Sequential(nn.Linear(WIDTH, 1100), nn.Tanh(), nn.Linear(1100, WIDTH))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_batch_size": BATCH,
            "optimizer": {
                "type": "ALTO",
                "params": {"lr": 0.1, "state_dtype": state_dtype},
            },
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        },
    )
    for step in range(STEPS):
        torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
        inputs = torch.randn(BATCH // dist.get_world_size(), WIDTH)
        engine.backward((engine(inputs) - inputs).square().mean())
        engine.step()
        if after_step is not None:
            after_step(engine, step)
    return engine


def contents(engine: Any) -> list[Tensor]:
    """Master weights and states, whole."""
    values = []
    for param in engine.module.parameters():
        values.append(safe_get_full_fp32_param(param))
        values += [safe_get_full_optimizer_state(param, key) for key in STATES]
    return [value.detach().clone() for value in values]


def changes(left: list[Tensor], right: list[Tensor]) -> int:
    """How many tensors differ in a bit."""
    return sum(not torch.equal(a, b) for a, b in zip(left, right, strict=True))


def run_nvme() -> dict[str, Any]:
    engine = train(nvme())
    found = contents(engine)
    # A state that lies on NVMe is empty in memory.
    on_nvme = [
        key
        for state in engine.optimizer.optimizer.state.values()
        for key in STATES
        if state[key].numel() == 0
    ]
    return {"changes": changes(found, contents(train(ZERO3))), "on_nvme": on_nvme}


def run_misaligned() -> dict[str, Any]:
    return message_of(lambda: train(nvme() | {"sub_group_size": 10**9}))


def run_few_buffers() -> dict[str, Any]:
    return message_of(lambda: train(nvme(buffer_count=4)))


def run_bf16_states() -> dict[str, Any]:
    return message_of(lambda: train(nvme(), state_dtype="bf16"))


def run_partial_offload() -> dict[str, Any]:
    return message_of(lambda: train(ZERO3 | {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}))


def run_offload_states_of_zero3() -> dict[str, Any]:
    engine = train(ZERO3)
    return message_of(lambda: engine.offload_states())


def run_offload_states() -> dict[str, Any]:
    """Under ZeRO-2, between two steps; then on a stand-in for another device."""

    def move(engine: Any, step: int) -> None:
        if step == 1:
            engine.offload_states()
            engine.reload_states()

    def own(alto: Any) -> list[Tensor]:
        # Not whole: after a move DeepSpeed's safe_get_full_optimizer_state() finds no states.
        return [x for t, state in alto.state.items() for x in (t, *(state[k] for k in STATES))]

    alto = train({"stage": 2}, move).optimizer.optimizer
    straight = train({"stage": 2}).optimizer.optimizer
    result: dict[str, Any] = {"changes": changes(own(alto), own(straight))}
    # What engine.offload_states() calls. Without an accelerator there is but one device with data.
    offload_optimizer_states(alto, "meta")
    result["devices"] = [
        [state[key].device.type for key in STATES] for state in alto.state.values()
    ]
    return result


def message_of(run: Callable[[], Any]) -> dict[str, Any]:
    """The error that ``run`` must raise."""
    try:
        run()
    except (RuntimeError, AssertionError) as error:
        return {"message": str(error)}
    raise AssertionError("no error was raised")


RUNS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "memory": {
        "offload-states": run_offload_states,
        "offload-states-zero3": run_offload_states_of_zero3,
        "partial-offload": run_partial_offload,
    },
    "nvme": {
        "nvme": run_nvme,
        "nvme-few-buffers": run_few_buffers,
        "nvme-misaligned": run_misaligned,
        "nvme-bf16-states": run_bf16_states,
    },
}


def main() -> None:
    torch.set_num_threads(1)
    # Compiling this op takes longer than all the cases; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, run in RUNS[sys.argv[2]].items():
        try:
            result = run()
        except Exception:
            result = {"error": traceback.format_exc()}
            print(result["error"], file=sys.stderr, flush=True)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, result)
        results[name] = everyone
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
