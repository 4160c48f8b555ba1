"""How do all ranks learn that one of them could not read or write?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or loaded, raised on every rank alike."""


class Ranks:
    """All ranks, to work on files together. All ranks must make it and call its methods together.

    They talk in a gloo group of their own, for files are the CPU's work and may take longer than
    a collective of training. A rank that is lost ends the others after PyTorch's default for
    gloo, 30 minutes, or at once where its connections close.

    Attributes:
        number: rank of this process.
        count: number of ranks.
    """

    def __init__(self) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group(self._group)

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on all ranks."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Let each rank work; what each returned, on all ranks.

        Raises:
            CheckpointError: on all ranks, with the message of the first rank whose work raised
                an OSError or a CheckpointError. Other errors are those of a lost rank.
        """
        result, error = None, None
        try:
            result = work()
        except (OSError, CheckpointError) as exception:
            error = exception
        for rank, (message, _) in enumerate(found := self.gather((error and f"{error}", result))):
            if message:
                raise CheckpointError(f"rank {rank}: {message}") from error
        return [value for _, value in found]  # type: ignore[misc]

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 work; what it returned, on all ranks.

        Raises:
            CheckpointError: on all ranks, where it raised an OSError or a CheckpointError.
        """
        return self.together(lambda: work() if self.number == 0 else None)[0]  # type: ignore[return-value]
