"""The two passes over fragments, once in plain PyTorch and once for each kind of device."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from alto_ds.kernels import cpu, reference
from alto_ds.kernels.types import Batch, FragmentTable, Hyperparameters, Kernel, largest_weight

__all__ = ["Batch", "FragmentTable", "Hyperparameters", "Kernel", "choose", "largest_weight"]


def choose(batch: Batch) -> Kernel:
    """The fastest kernel that can work on ``batch``."""
    # The others go through memory by address.
    if all(x.is_contiguous() for column in batch[:-1] for x in column):
        device = batch.params[0].device.type
        if device == "cpu" and cpu.supports(batch):
            return cpu
        if device in ("cuda", "xpu") and _triton() is not None and _triton().supports(batch):
            return _triton()
    return reference


@functools.cache
def _triton() -> Any:
    """The kernel in Triton; None where that is not installed."""
    # Imported late, for it takes longer than all of alto_ds.
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("alto_ds.kernels.triton")
