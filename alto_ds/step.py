"""One step of all tensors of a plan: two passes of a kernel, and one all-reduce between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alto_ds import kernels, nonfinite, settings
from alto_ds.batches import Part, Plan, Shard
from alto_ds.states import STEP
from alto_ds.trust_ratio import add_over_ranks, trust_ratios


def take_step(plan: Plan, parts: Sequence[Part], shards: Sequence[Shard]) -> nonfinite.News | None:
    """Update states and weights of ``shards``. All ranks that share a layer call this together.

    Args:
        plan: made for the same groups and shards; ``sums`` and ``ratios`` are changed.
        parts: the parameter groups.
        shards: the tensors, whose ``step`` is counted up.

    Returns:
        What was not finite; see :func:`alto_ds.nonfinite.raise_if_found`.
    """
    passes = []
    for members in plan.batches:
        first = shards[members.indices[0]]
        hyper = settings.hyperparameters(first.part.group, first.state[STEP] + 1)
        batch = _batch([shards[i].columns for i in members.indices], members.fragments)
        passes.append((kernels.choose(batch), batch, hyper))
    for shard in shards:
        shard.state[STEP] += 1

    plan.sums.zero_()
    for kernel, batch, hyper in passes:
        sums = plan.sums.to(batch.params[0].device)
        kernel.update_states(batch, hyper, sums)
        if sums is not plan.sums:
            plan.sums.copy_(sums)
    here = nonfinite.mark(plan, parts)
    add_over_ranks(plan.sums, plan.rows_of)
    sizes, left = torch.empty_like(plan.ratios), torch.zeros_like(here)
    for (group, _), rows in zip(parts, plan.rows, strict=True):
        plan.ratios[rows] = _ratios(plan.sums[rows], group)
        sizes[rows] = plan.ratios[rows] * group["lr"]
        if group["nonfinite"] != "ignore":
            left[rows] = nonfinite.leave(plan.sums[rows], sizes[rows], plan.largest[rows])
    for kernel, batch, hyper in passes:
        kernel.apply_update(batch, hyper, sizes.to(batch.params[0].device))
    return nonfinite.collect(plan, here, left, [(batch, hyper.step) for _, batch, hyper in passes])


def _batch(shards: Sequence[tuple[Tensor, ...]], fragments: kernels.FragmentTable) -> kernels.Batch:
    params, grads, *averages, exp_avgs, exp_avg_sqs = zip(*shards, strict=True)
    exp_avg_grads = averages[0] if averages else ()
    return kernels.Batch(params, grads, exp_avg_grads, exp_avgs, exp_avg_sqs, fragments)


def _ratios(sums: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Trust ratios ``[layers]`` from sums ``[layers, 2]``, 1 where layers are not scaled."""
    if not group["trust_ratio"]:
        return torch.ones_like(sums[:, 0])
    _, eps2, eps3 = settings.three_eps(group["eps"])
    return trust_ratios(sums, eps2, eps3, group["trust_clip"])
