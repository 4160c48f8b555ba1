"""Ranks that hold no tensor at all, or nothing of some layers, as in megatron-core's optimizer.

A test framework cuts layers as megatron-core's DistributedOptimizer does: an optimizer has one
tensor for each parameter of which this rank holds a piece, and none for the others. Gradients are
known, so the yardstick is given the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

import alto_ds
from alto_ds import layout, states
from alto_ds.layout import Fragment, Layer, Layout
from tests.sharding.harness import (
    AllReduceCounter,
    Case,
    NaiveALTO,
    deviation,
    ratio_deviation,
)
from tests.sharding.linear_model import LinearModel, Yardstick
from tests.sharding.pieces import Piece, assemble

STEPS, BATCH, CLIPPING = 20, 16, 0.5
SETTINGS: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.9, 0.9, 0.99),
    "alpha": -5.0,
    "weight_decay": 0.1,
}
LEARNING_RATES = [0.05, 0.01, 0.05]  # one a group
STATES = (states.EXP_AVG_GRAD, states.EXP_AVG, states.EXP_AVG_SQ)

# Where the pieces of ranks 0, 1 and 2 end; rank 3 holds nothing. The decayed group's layers are
# cut anywhere. Of the second group, rank 0 has nothing; of the third, only rank 0 has something.
ENDS = {
    "matrix": (150, 407, 407),
    "scalar": (0, 1, 1),
    "thin": (0, 31, 192),
    "dead": (0, 0, 7),
    "zero": (4, 5, 9),
    "vector": (1, 128, 129),
    "tied": (54, 54, 54),
    "bias": (0, 6, 13),
    "norm": (0, 1, 1),
    "lone": (1, 1, 1),
}


@dataclass(frozen=True, kw_only=True)
class ShardCase(Case):
    """Which optimizer gets the shards.

    Attributes:
        make: makes it from the model's groups.
        optimizer: settings that differ from ``SETTINGS``.
    """

    make: Callable[..., alto_ds.ALTO] = alto_ds.ALTO
    optimizer: dict[str, Any] = field(default_factory=dict)


def range_of(name: str, rank: int) -> tuple[int, int]:
    """Where a rank's piece of a layer begins and ends."""
    ends = (0, *ENDS[name], ENDS[name][-1])
    return ends[rank], ends[rank + 1]


def resolve(tensors: Sequence[Tensor], params: Sequence[Tensor], names: Any) -> Layout | None:
    """The layers of a group, on every rank, and this rank's fragments.

    A model's parameter knows its place in the model and who shares it, a shard its parameter.
    """
    trained: list[Any] = [param for param in params if param.requires_grad]
    if not all(hasattr(param, "place") for param in trained):
        return None
    rows = {param: row for row, param in enumerate(trained)}
    fragments = []
    for index, tensor in enumerate(tensors):
        param = getattr(tensor, "param")  # noqa: B009  unknown to mypy
        begin, end = range_of(param.place, dist.get_rank())
        whole = end - begin == param.numel()
        fragments.append(
            Fragment(
                tensor=index,
                offset=0,
                length=end - begin,
                start=begin,
                layer=rows[param],
                whole=whole,
            )
        )
    layers = tuple(Layer(param, names[param], (param.group,)) for param in trained)
    return Layout(layers=layers, fragments=tuple(fragments))


def shard_of(name: str, param: Any, group: Any) -> Any:
    """This rank's piece of a parameter as a tensor of its own; None where it has none."""
    param.place, param.group = name, group
    begin, end = range_of(name, dist.get_rank())
    if begin == end:
        return None
    shard: Any = nn.Parameter(param.detach().flatten()[begin:end].clone())
    shard.param = param
    return shard


def run_shards(case: ShardCase, _: Path) -> dict[str, Any]:
    """Train on shards beside the yardstick, and compare all that they hold."""
    framework = layout.Framework(resolve=resolve)
    layout.FRAMEWORKS.insert(0, framework)
    try:
        return train(case)
    finally:
        layout.FRAMEWORKS.remove(framework)


def train(case: ShardCase) -> dict[str, Any]:
    """See :func:`run_shards`."""
    settings = SETTINGS | case.optimizer
    # A group of its own, of less patience than the others': a rank that does not join must not
    # break other cases.
    group = dist.new_group(timeout=timedelta(seconds=30))
    model = LinearModel()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    yardstick = Yardstick(named, functools.partial(alto_ds.ALTO, **settings))
    optimizer = case.make(model.groups(), **settings)
    shards = {name: shard_of(name, param, group) for name, param in named.items()}
    shards = {name: shard for name, shard in shards.items() if shard is not None}
    for index, param_group in enumerate(optimizer.param_groups):
        param_group["params"] = [s for n, s in shards.items() if LinearModel.group_of(n) == index]
    counter = AllReduceCounter(optimizer)
    for step in range(STEPS):
        samples = range(step * BATCH, (step + 1) * BATCH)
        grads = LinearModel.clipped_gradients(samples, CLIPPING)
        for name, shard in shards.items():
            begin, end = range_of(name, dist.get_rank())
            shard.grad = grads[name].flatten()[begin:end].clone()
        optimizer.step()
        yardstick.step(grads, LEARNING_RATES)
    values = {"masters": {shard: shard for shard in shards.values()}}
    for key in STATES:
        values[key] = {shard: optimizer.state[shard][key] for shard in shards.values()}
    pieces = {
        s: [Piece(n, range_of(n, dist.get_rank())[0], s.numel(), 0)] for n, s in shards.items()
    }
    found = assemble(values, pieces, sharded=True, group=group)
    result = {
        "held": {name: shard.numel() for name, shard in shards.items()},
        "sent": counter.calls,
        "moved": deviation(yardstick.masters(), {n: p.detach() for n, p in named.items()}),
        "masters": deviation(found["masters"], yardstick.masters()),
        "states": {key: deviation(found[key], yardstick.states(key)) for key in STATES},
    }
    if not isinstance(optimizer, NaiveALTO):
        ratios = optimizer.trust_ratios(model.named_parameters())
        result["ratios"] = ratio_deviation(ratios, yardstick.optimizer.trust_ratios())
    return result


CASES = {
    "shards": ShardCase(measures=run_shards),
    "shards-bf16-states": ShardCase(measures=run_shards, optimizer={"state_dtype": "bf16"}),
    "shards-naive": ShardCase(measures=run_shards, make=NaiveALTO),
}
