"""The two passes over fragments, once in plain PyTorch and once for each kind of device."""

from __future__ import annotations

from alto_ds.kernels import cpu, reference
from alto_ds.kernels.types import Batch, FragmentTable, Kernel, StepSizes

__all__ = ["Batch", "FragmentTable", "Kernel", "StepSizes", "choose"]


def choose(batch: Batch) -> Kernel:
    """The fastest kernel that can work on ``batch``."""
    # The others go through memory by address.
    if not all(x.is_contiguous() for column in batch[:-1] for x in column):
        return reference
    if batch.params[0].device.type == "cpu" and cpu.supports(batch):
        return cpu
    return reference
