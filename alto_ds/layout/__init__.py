"""Which parts of which layers are in a parameter group's tensors, and who holds the rest?

A *layer* is one parameter of the model. A *fragment* is a contiguous range of one layer that lies
in a tensor this rank's optimizer updates. A :class:`Layout` lists both for one parameter group.
Whoever makes a layout knows a framework's rules; whoever uses one knows none. Each framework is
one module of this package and one entry of :data:`FRAMEWORKS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from alto_ds.layout import dtensor, tensor_parallel, whole, zero
from alto_ds.layout.dtensor import is_dtensor, local, local_grad
from alto_ds.layout.own import OwnParameters
from alto_ds.layout.types import Fragment, Framework, Layer, Layout, Names

__all__ = [
    "FRAMEWORKS",
    "Fragment",
    "Framework",
    "Layer",
    "Layout",
    "Names",
    "OwnParameters",
    "is_dtensor",
    "local",
    "local_grad",
    "resolve",
]

# Asked in this order. The first that recognises the tensors tells their ranges; all that know
# other holders of a parameter are heard.
FRAMEWORKS = [
    Framework(resolve=zero.resolve),
    Framework(groups_of=dtensor.groups_of),
    Framework(groups_of=tensor_parallel.groups_of),
    Framework(resolve=whole.resolve),
]


def resolve(
    tensors: Sequence[torch.Tensor], params: Sequence[torch.Tensor], names: Names
) -> Layout:
    """Return the layout of a parameter group.

    No communication takes place; every rank arrives at the same list of layers.

    Args:
        tensors: what the group holds when ``step()`` is called: parameters, flat buffers that a
            wrapper put there, or nothing.
        params: what the same group held when the optimizer was made: the model's parameters.
        names: a name for each parameter in ``params``.

    Raises:
        RuntimeError: no framework recognises the tensors. A guess would give wrong trust ratios
            without any sign of it.
    """
    for framework in FRAMEWORKS:
        layout = framework.resolve and framework.resolve(tensors, params, names)
        if layout:
            return _with_all_holders(layout)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    raise RuntimeError(
        f"alto_ds does not know which layers are in the parameter group's tensors of shapes "
        f"{shapes}: they are neither the {len(params)} parameters that the optimizer was made "
        f"with, nor copies of their shapes, nor flat tensors of DeepSpeed's ZeRO. Layer-wise "
        f"trust ratios of unknown tensors would be wrong; pass the model's own parameters, or "
        f"use one of the wrappers that the README lists as exact."
    )


def _with_all_holders(layout: Layout) -> Layout:
    """The layout with the process groups that hold the rest of what is one parameter here."""
    others = [
        tuple(
            group
            for framework in FRAMEWORKS
            if framework.groups_of
            for group in framework.groups_of(layer.param, layer.name)
        )
        for layer in layout.layers
    ]
    return dataclasses.replace(
        layout,
        layers=tuple(
            dataclasses.replace(layer, groups=(*layer.groups, *groups))
            for layer, groups in zip(layout.layers, others, strict=True)
        ),
        fragments=tuple(
            f._replace(whole=f.whole and not others[f.layer]) for f in layout.fragments
        ),
    )
