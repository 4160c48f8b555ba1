"""NaN and infinity in one element on one rank, past all that wrappers check by themselves.

The element is set right before the optimizer's own step, after DeepSpeed has looked at the
gradients, and its old value is put back after it, so that one engine takes all kinds of damage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

import alto_ds
from alto_ds import states
from alto_ds.layout import local
from tests.sharding import dtensor_cases, zero_cases
from tests.sharding.dtensor_cases import DTensorCase
from tests.sharding.harness import Case, bare
from tests.sharding.pieces import pieces_of
from tests.sharding.zero_cases import ZeroCase, engine_of

ALTO_PLACES = ("gradient", "weight", states.EXP_AVG_GRAD, states.EXP_AVG, states.EXP_AVG_SQ)
E_PLACES = ("gradient", states.E_EXP_AVG_GRAD)
VALUES = (math.nan, math.inf, -math.inf)

# Where a layer lies in this rank's tensors: tensor, first element, number of elements.
Part = tuple[Tensor, int, int]


@dataclass(frozen=True, kw_only=True)
class NonfiniteCase(Case):
    """What is trained, and by whom.

    Attributes:
        trains: a case of another module, which cuts the model.
        layer: the one that is damaged.
        layers: those damaged in a step that is skipped, one in each call of the optimizer's
            ``step()``: ZeRO makes one for each parameter group.
        places: what is damaged.
    """

    trains: ZeroCase | DTensorCase
    layer: str = "matrix"
    layers: tuple[str, ...] = ("matrix", "bias", "lone")
    places: tuple[str, ...] = ALTO_PLACES


def flat(tensor: Tensor, place: str, optimizer: Optimizer) -> Tensor:
    """What is at a place, as a flat view of this rank's part."""
    found: Any = tensor.grad if place == "gradient" else tensor.data
    if place not in ("gradient", "weight"):
        found = optimizer.state[tensor][place]
    return local(found).view(-1)


class Damage:
    """Sets one element on one rank in the optimizer's next step, and keeps what that raises.

    Args:
        optimizer: the bare one; its ``step`` is replaced on this object alone.
        parts: the layers' parts on this rank; padding is in none.
    """

    def __init__(self, optimizer: Any, parts: Mapping[str, Sequence[Part]]) -> None:
        self.optimizer, self.parts = optimizer, parts
        self.next: tuple[tuple[str, ...], str, float] | None = None
        self.report: dict[str, Any] = {}
        self._step = optimizer.step
        optimizer.step = self._damaged_step

    def _damaged_step(self, *arguments: Any) -> None:
        layers, place, value = self.next or ((), "", 0.0)
        layer = next((layer for layer in layers if self._is_in_this_call(layer)), None)
        if layer is None:
            self._step(*arguments)
            return
        part = next((part for part in self.parts.get(layer, ()) if part[2]), None)
        holders: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(holders, part is not None)
        victim = max(rank for rank, holds in enumerate(holders) if holds)
        old: Tensor | None = None
        if dist.get_rank() == victim:
            assert part is not None
            element = flat(part[0], place, self.optimizer)[part[1] + part[2] - 1]
            old = element.clone()
            element.fill_(value)
        before = self.values()
        message = ""
        try:
            self._step(*arguments)
        except FloatingPointError as error:
            message = str(error)
        after = self.values()
        self.report = {
            "victim": victim,
            "message": message,
            "changed": sum(
                not torch.equal(a.nan_to_num(), b.nan_to_num())
                for a, b in zip(before, after, strict=True)
            ),
            "spread": sum(
                not torch.equal(a.isfinite(), b.isfinite())
                for a, b in zip(before, after, strict=True)
            ),
        }
        if old is not None and part is not None:
            element.copy_(old)

    def _is_in_this_call(self, layer: str) -> bool:
        """DeepSpeed calls once for each group, and the ranks' tensors tell which that is."""
        held = {id(t) for group in self.optimizer.param_groups for t in group["params"]}
        own = any(id(tensor) in held for tensor, _, _ in self.parts.get(layer, ()))
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        return any(found)

    def values(self) -> list[Tensor]:
        """Copies of all layers' parts in weights and states."""
        found = []
        for parts in self.parts.values():
            for tensor, offset, length in parts:
                held = self.optimizer.state.get(tensor, {})
                places = ["weight", *(key for key, v in held.items() if _is_like(v, tensor))]
                for place in places:
                    found.append(
                        flat(tensor, place, self.optimizer)[offset : offset + length].clone()
                    )
        return found


def _is_like(value: Any, tensor: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == tensor.shape


@contextlib.contextmanager
def training(case: ZeroCase | DTensorCase) -> Iterator[tuple[Damage, Any, Callable[[int], None]]]:
    """The optimizer to damage, the DeepSpeed engine if there is one, and what takes a step."""
    if isinstance(case, ZeroCase):
        with engine_of(case) as engine:
            parts: dict[str, list[Part]] = {}
            for tensor, pieces in pieces_of(engine, bare(engine)).items():
                for piece in pieces:
                    parts.setdefault(piece.name, []).append((tensor, piece.offset, piece.length))
            damage = Damage(bare(engine), parts)
            yield damage, engine, lambda step: zero_cases.train_step(engine, case, step)
    else:
        model, optimizer = dtensor_cases.make(case)
        named = model.named_parameters()
        damage = Damage(optimizer, {name: [(p, 0, local(p).numel())] for name, p in named})

        def train_step(step: int) -> None:
            dtensor_cases.backward(model, case.dtype, dtensor_cases.own_samples(case), step)
            optimizer.step()

        yield damage, None, train_step


def run_damaged(case: NonfiniteCase, _: Path) -> dict[str, Any]:
    """Take a good step, a damaged one for each place and value, and a good one; report each."""
    with training(case.trains) as (damage, _engine, train_step):
        train_step(0)
        rows: list[dict[str, Any]] = []
        for place in case.places:
            for value in VALUES:
                damage.next = ((case.layer,), place, value)
                train_step(len(rows) + 1)
                rows.append({"place": place, "step": len(rows) + 2, **damage.report})
        damage.next = None
        train_step(len(rows) + 1)
        finite = all(bool(value.isfinite().all()) for value in damage.values())
        return {"rows": rows, "finite": finite}


def run_skipped(case: NonfiniteCase, _: Path) -> dict[str, Any]:
    """A skipped step between two good ones, compared with these two alone."""
    ends, report = [], {}
    for steps in ((0, 1, 2), (0, 2)):
        with training(case.trains) as (damage, _engine, train_step):
            for step in steps:
                damage.next = (case.layers, "gradient", math.nan) if step == 1 else None
                train_step(step)
                if step == 1:
                    report = {**damage.report, "skipped": damage.optimizer.skipped_steps}
            ends.append(damage.values())
    return {**report, "different": sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))}


def run_replicated(case: NonfiniteCase, _: Path) -> dict[str, Any]:
    """Every rank has all layers: a loss that is infinite on one rank is a gradient on all."""
    with training(case.trains) as (damage, engine, train_step):
        train_step(0)
        before = damage.values()
        engine.module.overflows = dist.get_rank() == dist.get_world_size() - 1
        message = ""
        try:
            train_step(1)
        except FloatingPointError as error:
            message = str(error)
        finite = all(bool(value.isfinite().all()) for value in damage.values())
        assert len(before) > 10
        return {"message": message, "finite": finite}


CONSTANT_RATE = {
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.05, "warmup_max_lr": 0.05, "warmup_num_steps": 1},
    }
}
ZERO_ROWS = (
    *("zero1-fp32", "zero1-bf16-fp32-accumulation", "zero2-offload-bf16", "zero2-fp32"),
    *("zero3-fp32", "zero3-sub-groups", "zero3-bf16-states", "e-zero2-bf16", "e-zero3-fp32"),
)
DTENSOR_ROWS = ("fsdp2", "hsdp", "tp", "fsdp2-tp", "fsdp2-offload", "fsdp2-bf16-states", "e-fsdp2")
SKIPPED_ROWS = ("zero1-fp32", "zero2-fp32", "zero3-fp32", "e-zero3-fp32")


def _places(name: str) -> tuple[str, ...]:
    return E_PLACES if name.startswith("e-") else ALTO_PLACES


def _skipping(case: ZeroCase) -> ZeroCase:
    optimizer = case.optimizer | {"nonfinite": "skip"}
    return dataclasses.replace(case, optimizer=optimizer, config=case.config | CONSTANT_RATE)


CASES: dict[str, NonfiniteCase] = {
    **{
        f"damaged-{name}": NonfiniteCase(
            measures=run_damaged,
            worlds=(2,),
            trains=zero_cases.CASES[name],
            places=_places(name),
        )
        for name in ZERO_ROWS
    },
    **{
        f"damaged-{name}": NonfiniteCase(
            measures=run_damaged,
            trains=dtensor_cases.CASES[name],
            # Of the embedding tensor parallelism leaves whole gradients, which the optimizer cuts.
            layer="column.weight" if name == "tp" else "embedding.weight",
            places=_places(name),
        )
        for name in DTENSOR_ROWS
    },
    **{
        f"skipped-{name}": NonfiniteCase(
            measures=run_skipped,
            worlds=(2,),
            trains=_skipping(zero_cases.CASES[name]),
        )
        for name in SKIPPED_ROWS
    },
    "skipped-fsdp2": NonfiniteCase(
        measures=run_skipped,
        trains=dataclasses.replace(
            dtensor_cases.CASES["fsdp2"], make=functools.partial(alto_ds.ALTO, nonfinite="skip")
        ),
        layers=("embedding.weight",),
    ),
    # Two ranks share no part of the damaged copy, but other layers with its holders.
    "damaged-column-of-a-mesh": NonfiniteCase(
        measures=run_damaged,
        trains=dtensor_cases.CASES["fsdp2-tp"],
        layer="norm.weight",
        places=ALTO_PLACES[1:],
    ),
    # Nothing is sent here: a state of one rank alone is that rank's error.
    "damaged-replica": NonfiniteCase(
        measures=run_damaged,
        worlds=(2,),
        trains=zero_cases.CASES["zero0-fp32"],
        places=ALTO_PLACES[1:],
    ),
    "overflow-of-a-replica": NonfiniteCase(
        measures=run_replicated,
        worlds=(2,),
        trains=zero_cases.CASES["zero0-fp32"],
    ),
}
