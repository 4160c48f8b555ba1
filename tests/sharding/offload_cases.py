"""What DeepSpeed moves out of an accelerator's memory: ZeRO-Infinity's NVMe, and offload_states().

The same model trains with and without NVMe, and with its states moved away and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_states import offload_optimizer_states
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from alto_ds import states
from tests.sharding.harness import Case, bare

WIDTH, BATCH, STEPS = 1024, 8, 4
STATES = (states.EXP_AVG_GRAD, states.EXP_AVG, states.EXP_AVG_SQ)
# A sub-group for each parameter. DeepSpeed swaps tensors of 1 MiB and more: both matrices.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1}


@dataclass(frozen=True, kw_only=True)
class OffloadCase(Case):
    """What is moved.

    Attributes:
        zero: keys that differ from ``ZERO3`` in the JSON's ``zero_optimization``.
        nvme: further keys of ``offload_optimizer`` with the device NVMe; None for no such device.
        state_dtype: ALTO's setting.
        message: part of the error that all ranks must raise.
    """

    zero: dict[str, Any] = field(default_factory=dict)
    nvme: dict[str, Any] | None = None
    state_dtype: str = "fp32"
    message: str = ""

    def zero_optimization(self, folder: Path) -> dict[str, Any]:
        """The JSON's ``zero_optimization``, with files in ``folder``."""
        device = {"device": "nvme", "nvme_path": str(folder.resolve()), "buffer_count": 5}
        offload = {} if self.nvme is None else {"offload_optimizer": device | self.nvme}
        return ZERO3 | offload | self.zero


def train(
    zero: dict[str, Any],
    state_dtype: str = "fp32",
    after_step: Callable[[Any, int], None] | None = None,
) -> Any:
    """A trained engine."""
    torch.manual_seed(1234)
    model = nn.Sequential(nn.Linear(WIDTH, 1100), nn.Tanh(), nn.Linear(1100, WIDTH))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_batch_size": BATCH,
            "optimizer": {"type": "ALTO", "params": {"lr": 0.1, "state_dtype": state_dtype}},
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


def run_nvme(case: OffloadCase, folder: Path) -> dict[str, Any]:
    """Train with states on NVMe, and in memory."""
    engine = train(case.zero_optimization(folder))
    found = contents(engine)
    # A state that lies on NVMe is empty in memory.
    on_nvme = [
        key for state in bare(engine).state.values() for key in STATES if state[key].numel() == 0
    ]
    return {"changes": changes(found, contents(train(ZERO3))), "on_nvme": on_nvme}


def run_refused(case: OffloadCase, folder: Path) -> dict[str, Any]:
    """The error that training, or then moving the states away, must raise."""
    try:
        train(case.zero_optimization(folder), case.state_dtype).offload_states()
    except (RuntimeError, AssertionError) as error:
        return {"message": str(error)}
    return {"message": "none"}


def run_offload_states(case: OffloadCase, folder: Path) -> dict[str, Any]:
    """Move states between two steps; then to a stand-in for another device."""

    def move(engine: Any, step: int) -> None:
        if step == 1:
            engine.offload_states()
            engine.reload_states()

    def own(optimizer: Any) -> list[Tensor]:
        # Not whole: after a move DeepSpeed's safe_get_full_optimizer_state() finds no states.
        return [x for t, state in optimizer.state.items() for x in (t, *(state[k] for k in STATES))]

    moved = bare(train(case.zero, after_step=move))
    straight = bare(train(case.zero))
    result: dict[str, Any] = {"changes": changes(own(moved), own(straight))}
    # What engine.offload_states() calls. Without an accelerator there is but one device with data.
    offload_optimizer_states(moved, "meta")
    result["devices"] = [
        [state[key].device.type for key in STATES] for state in moved.state.values()
    ]
    return result


CASES: dict[str, OffloadCase] = {
    "offload-states": OffloadCase(measures=run_offload_states, worlds=(2,), zero={"stage": 2}),
    "offload-states-zero3": OffloadCase(
        measures=run_refused,
        worlds=(2,),
        message="Offloading is supported only for DeepSpeed FusedAdam",
    ),
    "partial-offload": OffloadCase(
        measures=run_refused,
        worlds=(2,),
        zero={"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        message="Hybrid Optimizer Only Supports DeepSpeedCPUAdam",
    ),
    "nvme": OffloadCase(measures=run_nvme, nvme={}, slow=True),
    "nvme-few-buffers": OffloadCase(
        measures=run_refused,
        nvme={"buffer_count": 4},
        slow=True,
        message='"buffer_count": 4} is too few; write 5',
    ),
    "nvme-misaligned": OffloadCase(
        measures=run_refused,
        zero={"sub_group_size": 10**9},
        nvme={},
        slow=True,
        message="loses the gradient of",
    ),
    "nvme-bf16-states": OffloadCase(
        measures=run_refused,
        nvme={},
        state_dtype="bf16",
        slow=True,
        message='"state_dtype": "bf16" cannot be used with offload to NVMe',
    ),
}
