"""How do all ranks stop together where one of them fails?"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
PREPARATION_TIMEOUT = timedelta(hours=24)


class SetupError(RuntimeError):
    """What a user must change, raised on every rank alike."""


def on_ranks(here: bool, work: Callable[[], T]) -> T | None:
    """Do ``work`` where ``here`` is true and wait for all ranks; raise everywhere if one failed.

    Every rank must call this together. A rank that failed alone would leave the others waiting in
    their next collective.

    Returns:
        What ``work`` returned, None where ``here`` is false.

    Raises:
        SetupError: with the message of the first rank that failed.
    """
    # A group of its own, for preparing a large text takes longer than a collective of training
    # may, and gloo, for the work is the CPU's.
    group = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    result, error = None, None
    if here:
        try:
            result = work()
        except Exception as exception:
            error = exception
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else f"{error}", group=group)
    dist.destroy_process_group(group)
    for rank, message in enumerate(messages):
        if message is not None:
            raise SetupError(f"rank {rank}: {message}") from error
    return result
