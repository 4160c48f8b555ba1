"""NaN and infinity: kept out of weights and states, and told to all ranks that share a layer.

Under "raise" and "skip" the kernels leave blocks of states as they were that would not be finite,
and step sizes of 0 do so for weights. The sums of such a layer are not finite either, so the
all-reduce that every step makes carries the news to all who share it, and one more row of sums
carries it to those who share another layer. Details are asked for only where there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alto_ds.batches import Part, Plan, Shard
from alto_ds.kernels import Batch
from alto_ds.states import EXP_AVG, EXP_AVG_GRAD, EXP_AVG_SQ
from alto_ds.trust_ratio import add_over_ranks


class News(NamedTuple):
    """What a call of ``step()`` has found, which may still be on its way from the device.

    Attributes:
        plan: the call's plan. The last row of its sums is the number of ranks that have found
            something, and the sum of their numbers.
        here: ``[layers]``, whether this rank's part is not finite.
        left: ``[layers]``, whether the layer's weights were left as they were.
        batches: the call's batches with the number of their step. No gradients, which may be gone
            when this is read.
        found: whether there is anything, on the host.
        arrived: the event after which ``found`` may be read; None at once.
    """

    plan: Plan
    here: Tensor
    left: Tensor
    batches: list[tuple[Batch, int]]
    found: Tensor
    arrived: torch.Event | None


class Finding(NamedTuple):
    """A part of a layer that is not finite."""

    layer: str
    where: str
    rank: int
    step: int


def mark(plan: Plan, parts: Sequence[Part]) -> Tensor:
    """Return ``News.here``, and set the last row of the sums, which are not yet added up."""
    here = torch.zeros_like(plan.ratios, dtype=torch.bool)
    for part, rows in zip(parts, plan.rows, strict=True):
        if part.group["nonfinite"] != "ignore":
            here[rows] = ~plan.sums[rows].isfinite().all(1)
    if plan.rows_of:
        plan.sums[-1, 0] = here.any()
        plan.sums[-1, 1] = here.any() * this_rank()
    return here


def leave(sums: Tensor, step_sizes: Tensor, largest: Tensor) -> Tensor:
    """Set the step sizes of layers that would not stay finite to 0, and return which these are.

    No weight can become larger than ``‖θ‖ + step size · ‖r‖``. Does not wait for the device.

    Args:
        sums: ``[layers, 2]``, Σθ² and Σr² of whole layers.
        step_sizes: ``[layers]``, learning rate times trust ratio; changed in place.
        largest: ``[layers]``, what a weight may become.
    """
    weight_norm, update_norm = sums.sqrt().unbind(1)
    # A NaN compares as False.
    left = ~((step_sizes <= largest) & (weight_norm + step_sizes * update_norm <= largest))
    step_sizes.masked_fill_(left, 0)
    return left


def collect(
    plan: Plan, here: Tensor, left: Tensor, batches: Iterable[tuple[Batch, int]]
) -> News | None:
    """Return what a call has found, without waiting for the device; None where that is nothing."""
    found = left.any() | (plan.sums[-1, 0] > 0)
    arrived = None
    if found.device.type != "cpu":
        on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
        found = on_host.copy_(found, non_blocking=True)
        arrived = torch.Event(plan.sums.device)
        arrived.record()
    elif not found:
        return None
    kept = [(batch._replace(grads=()), step) for batch, step in batches]
    return News(plan, here, left, kept, found, arrived)


class Watch:
    """What the steps of one optimizer have found, until it has been raised.

    All ranks that share a layer must call each method together.
    """

    def __init__(self) -> None:
        self._news: News | None = None
        self._message = ""

    def note(self, news: News | None) -> None:
        """Keep what the latest call of ``step()`` has found; raise it where it is here already."""
        self._news, self._message = news, ""
        if news is not None and news.arrived is None:
            self.check()

    def check(self) -> None:
        """Raise what the latest call has found, once.

        Raises:
            FloatingPointError: names layers, steps, ranks and where the bad numbers are.
        """
        news, self._news = self._news, None
        if news is None:
            return
        if news.arrived is not None:
            news.arrived.synchronize()
        if news.found:
            self._message = _message(_findings_of_all(news), news.plan)
            raise FloatingPointError(self._message)

    def check_again(self) -> None:
        """As :meth:`check`, also where it was raised before and no step has been taken since."""
        self.check()
        if self._message:
            raise FloatingPointError(self._message)


def _findings_of_all(news: News) -> list[Finding]:
    """What all ranks that share a bad layer have found in it, in the order of the layers."""
    plan, left = news.plan, news.left.cpu()
    # The ranks of a group have the same sums of its layers, and so all of them ask, or none.
    asking = [group for group, rows in plan.rows_of.items() if left[rows[:-1]].any()]
    order = {layer.name: row for row, layer in enumerate(plan.layers)}
    findings = gather(_findings_here(news), asking)
    return sorted(findings, key=lambda f: (order.get(f.layer, len(order)), f.rank))


def gather(findings: list[Finding], groups: Iterable[ProcessGroup]) -> list[Finding]:
    """The findings of all ranks of ``groups``, who must call this together."""
    for group in groups:
        of_ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_ranks, findings, group=group)
        findings = list(dict.fromkeys(f for found in of_ranks for f in found))
    return findings


def _findings_here(news: News) -> list[Finding]:
    """What this rank's tensors have in layers that were left as they were."""
    sums, here, left = news.plan.sums.cpu(), news.here.tolist(), news.left.tolist()
    found = []
    for batch, step in news.batches:
        for f in batch.fragments.fragments():
            if not left[f.layer]:
                continue
            if here[f.layer]:
                where = _where(batch, f.tensor, slice(f.offset, f.offset + f.length))
            elif sums[f.layer].isfinite().all():
                where = "update, which is too large for the weight: lower the learning rate"
            else:
                continue  # another rank's
            found.append(Finding(news.plan.layers[f.layer].name, where, this_rank(), step))
    return found


def _where(batch: Batch, tensor: int, part: slice) -> str:
    """Which column of a batch is not finite. They were left as they were, so it still is."""
    columns = {
        "weight": batch.params,
        f"state {EXP_AVG_GRAD}": batch.exp_avg_grads,
        f"state {EXP_AVG}": batch.exp_avgs,
        f"state {EXP_AVG_SQ}": batch.exp_avg_sqs,
    }
    for name, column in columns.items():
        if column and not column[tensor].reshape(-1)[part].isfinite().all():
            return name
    return "gradient, NaN, infinite or too large"


def _message(findings: Sequence[Finding], plan: Plan) -> str:
    if not findings:
        ranks, their_sum = plan.sums[-1].tolist()
        who = f"rank {their_sum:.0f} has" if ranks == 1 else f"{ranks:.0f} ranks have"
        return (
            f"ALTO: {who} found numbers that are not finite in layers of which this rank has no "
            "part; what they say names them. All layers of this rank have been updated."
        )
    first = findings[0]
    ranks = ", ".join(str(f.rank) for f in findings if f[:2] == first[:2])
    others = dict.fromkeys(f.layer for f in findings if f.layer != first.layer)
    names = [*list(others)[:3], "..."] if len(others) > 3 else list(others)
    more = f", and so in {len(others)} more layers ({', '.join(names)})" if others else ""
    return (
        f"ALTO: step {first.step}: {first.layer} has numbers that are not finite in its "
        f"{first.where} (rank {ranks}){more}. None was written: the weights of these layers, and "
        "the states that would not be finite, are as they were before the step; all other states "
        "and layers of the call have been updated. Start again from the latest checkpoint, in a "
        'new process; "nonfinite": "skip" skips steps whose gradients are not finite.'
    )


def gradients_allow_step(plan: Plan, parts: Sequence[Part], shards: Sequence[Shard]) -> bool:
    """Whether all gradients of groups that skip are finite on all ranks that share a layer.

    All of these must call this together. Waits for the device where a group skips.
    """
    if all(part.group["nonfinite"] != "skip" for part in parts):
        return True
    grads = []
    for members in plan.batches:
        if shards[members.indices[0]].part.group["nonfinite"] == "skip":
            for f in members.fragments.fragments():
                grad = shards[members.indices[f.tensor]].columns[1].reshape(-1)
                grads.append(grad[f.offset : f.offset + f.length])
    return not ask(grads, plan.rows_of, plan.sums.device)[0]


def ask(
    tensors: Iterable[Tensor], groups: Iterable[ProcessGroup], device: torch.device
) -> tuple[bool, list[ProcessGroup]]:
    """Whether any of ``tensors`` is not finite on any rank of ``groups``; they call it together.

    Reads each tensor once, and waits for the device. Finite numbers whose sum is too large for
    their dtype count as not finite.

    Args:
        tensors: this rank's.
        groups: in the same order on all ranks; one all-reduce of 4 bytes each.
        device: where the result is added up.

    Returns:
        The answer, and the groups whose ranks all know that it is yes.
    """
    bad = torch.zeros(1, 1, device=device)
    for tensor in tensors:
        bad += (~is_finite(tensor)).to(device)
    row, after = torch.zeros(1, dtype=torch.int64), {}
    for group in groups:
        add_over_ranks(bad, {group: row})
        after[group] = bad.clone()
    return bool(bad), [group for group, known in after.items() if known]


def is_finite(tensor: Tensor) -> Tensor:
    """Whether the sum of ``tensor``, in float32 or better, is finite: a boolean on its device."""
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite()


def this_rank() -> int:
    """The global rank; 0 without process groups."""
    return dist.get_rank() if dist.is_initialized() else 0
