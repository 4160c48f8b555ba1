"""When do NaN and infinity end a run, so that no checkpoint of them is written?

Every function raises on all ranks alike, after a step and before it is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SkippedSteps:
    """Counts the steps in a row that DeepSpeed has skipped for a gradient that is not finite.

    Args:
        engine: DeepSpeed's engine.
        most: number of skipped steps in a row that ends the run.
    """

    def __init__(self, engine: Any, most: int) -> None:
        self._engine = engine
        self._most = most
        self._total = engine.skipped_steps
        self._in_a_row = 0

    def check(self, step: int) -> None:
        """Look at the step that was just done. All ranks agree on it: DeepSpeed has asked them.

        Raises:
            FloatingPointError: too many in a row were skipped.
        """
        skipped = self._engine.skipped_steps - self._total
        self._total += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= self._most:
            raise FloatingPointError(
                f"step {step}: the last {self._in_a_row} steps were skipped for gradients that are "
                f"not finite (--max_skipped_steps={self._most})."
            )


def error_of(work: Callable[[], Any]) -> FloatingPointError | None:
    """What the work of this rank has raised, which may be for this rank alone."""
    try:
        work()
    except FloatingPointError as error:
        return error
    return None


def raise_together(error: FloatingPointError | None) -> None:
    """Let all ranks, who must call this together, raise where one has an error.

    Raises:
        FloatingPointError: with the message of the first rank that has one.
    """
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, error and str(error))
    for message in filter(None, messages):
        raise FloatingPointError(message) from error


def check_loss(loss: float, step: int) -> None:
    """Refuse a loss, the mean over all ranks, that is not finite.

    Raises:
        FloatingPointError: it is not.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {step}: the loss is {loss}.")


def check_weights(module: nn.Module, step: int) -> None:
    """Refuse weights that are not finite. All ranks must call this together.

    Each rank reads the parameters that it holds, under ZeRO-3 its own parts: they are what the
    master weights have become in this step. It costs one pass over them and one object gathered.

    Raises:
        FloatingPointError: naming the first such parameter, and the ranks where it is so.
    """
    names, sums = [], []
    for name, param in module.named_parameters():
        part = _held(param)
        if part is not None:
            names.append(name)
            # Not finite where an element is not, and no tensor of the parameter's size is made.
            sums.append(part.detach().sum(dtype=torch.float32))
    finite = torch.stack(sums).isfinite().tolist() if sums else []
    bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, bad[:1])
    if any(of_ranks):
        ranks = [str(rank) for rank, found in enumerate(of_ranks) if found]
        first = next(found[0] for found in of_ranks if found)
        raise FloatingPointError(
            f"step {step}: the weights are not finite, first in {first} (rank {', '.join(ranks)})."
        )


def _held(param: Tensor) -> Tensor | None:
    """What this rank has of a parameter; None where it is on NVMe."""
    if not hasattr(param, "ds_tensor"):
        return param
    return param.ds_tensor if param.ds_tensor.status.name == "AVAILABLE" else None
