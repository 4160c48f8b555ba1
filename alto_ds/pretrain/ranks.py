"""How do all ranks stop together where one of them fails?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
    result, error = None, None
    if here:
        try:
            result = work()
        except Exception as exception:
            error = exception
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else f"{error}")
    for rank, message in enumerate(messages):
        if message is not None:
            raise SetupError(f"rank {rank}: {message}") from error
    return result
