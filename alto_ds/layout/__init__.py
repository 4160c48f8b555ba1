"""Which parts of which layers are in a tensor, and who holds the rest?

A *layer* is one parameter of the model. A *fragment* is a contiguous range of one layer that lies
in a tensor this rank's optimizer updates. A :class:`Layout` lists both for one tensor. Whoever
makes a layout knows a framework's rules; whoever uses one knows none. Each framework is one module
of this package; :func:`resolve` asks them in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from alto_ds.layout import whole, zero
from alto_ds.layout.dtensor import local, local_grad
from alto_ds.layout.types import Fragment, Layer, Layout

if TYPE_CHECKING:
    from alto_ds.layout.types import Names

__all__ = ["Fragment", "Layer", "Layout", "local", "local_grad", "resolve"]

_FRAMEWORKS = (zero.resolve, whole.resolve)


def resolve(
    tensors: Sequence[torch.Tensor], params: Sequence[torch.Tensor], names: Names
) -> list[Layout]:
    """Return the layout of each of ``tensors``, in their order.

    Args:
        tensors: what a parameter group holds when ``step()`` is called, which may be flat buffers
            that a wrapper put there.
        params: what the same group held when the optimizer was made: the model's parameters.
        names: a name for each parameter in ``params``.

    No communication takes place; every rank arrives at the same list of layers.

    Raises:
        RuntimeError: no framework recognises the tensors. A guess would give wrong trust ratios
            without any sign of it.
    """
    for resolve_framework in _FRAMEWORKS:
        layouts = resolve_framework(tensors, params, names)
        if layouts is not None:
            return layouts
    shapes = [tuple(tensor.shape) for tensor in tensors]
    raise RuntimeError(
        f"alto_ds does not know which layers are in the parameter group's tensors of shapes "
        f"{shapes}: they are neither the {len(params)} parameters that the optimizer was made "
        f"with, nor copies of their shapes, nor flat tensors of DeepSpeed's ZeRO. Layer-wise "
        f"trust ratios of unknown tensors would be wrong; pass the model's own parameters, or "
        f"use one of the wrappers that the README lists as exact."
    )
