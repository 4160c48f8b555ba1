"""How do all ranks learn that one of them has failed at work of its own, such as on files?"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or loaded, raised on every rank alike."""


class Ranks:
    """All ranks, to work on files together. All ranks must make it and call its methods together.

    They talk in the group of all ranks, which needs nobody any more who helped to make it, such as
    a launcher. A rank that is lost ends the others: at once where its connections close, otherwise
    after the timeout that ``torch.distributed`` was initialized with.

    Args:
        raises: what is raised on all ranks where one has failed.
        patience: how long the work may take; by default as long as a collective. Otherwise they
            talk in a gloo group of their own.

    Attributes:
        number: rank of this process.
        count: number of ranks.
    """

    def __init__(
        self,
        raises: type[Exception] = CheckpointError,
        patience: timedelta | None = None,
    ) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        self._raises = raises
        self._group: Any = None
        if patience is not None:
            # Its own timeout comes later: a rank that never joins it is lost, not busy.
            self._group = dist.new_group(backend="gloo")
            dist.distributed_c10d._set_pg_timeout(patience, self._group)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on all ranks."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def each(self, work: Callable[[], T]) -> T:
        """Let each rank work; what this rank's work returned, once all have finished theirs.

        Raises:
            Exception: ``raises``, on all ranks, with the message of the first rank whose work
                raised anything.
        """
        try:
            result, error = work(), None
        except Exception as exception:  # of any type: the others wait for this rank
            result, error = None, exception
        for rank, message in enumerate(self.gather(None if error is None else self._told(error))):
            if message is not None:
                raise self._raises(f"rank {rank}: {message}") from error
        return result  # type: ignore[return-value]  # None only where it has failed

    def _told(self, error: Exception) -> str:
        """Errors that are no refusals are of types that nobody foresaw, and are named by them."""
        foreseen = isinstance(error, OSError | ValueError | RuntimeError | self._raises)
        return f"{error}" if foreseen and f"{error}" else f"{type(error).__name__}: {error}"

    def together(self, work: Callable[[], T]) -> list[T]:
        """Let each rank work; what each returned, on all ranks. Raises as :meth:`each`."""
        return self.gather(self.each(work))

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 work; what it returned, on all ranks. Raises as :meth:`each`."""
        return self.together(lambda: work() if self.number == 0 else None)[0]  # type: ignore[return-value]
