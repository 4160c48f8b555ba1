"""The model's parameters themselves, or a master copy of each: one fragment in one tensor.

Covers one process, ``DistributedDataParallel``, ZeRO stage 0 and DeepSpeed's
``FP16_UnfusedOptimizer`` (stage 0 with fp16 or bf16), which puts an fp32 copy of each trainable
parameter in the parameter's place. A parameter may be a part of a layer, of which other ranks
have other parts: ``dtensor`` and ``tensor_parallel`` know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alto_ds.layout import dtensor
from alto_ds.layout.types import Fragment, Layer, Layout, Names

# Attributes of FSDP1's flat parameters, and of the parameters that it shows in their place.
_FSDP1_MARKS = ("_is_flat_param", "_fsdp_flattened")


def resolve(
    tensors: Sequence[torch.Tensor], params: Sequence[torch.Tensor], names: Names
) -> Layout | None:
    """See :func:`alto_ds.layout.resolve`; None where a tensor is neither parameter nor copy."""
    owners = _owners(tensors, params)
    if owners is None:
        return None
    layers, fragments = [], []
    for index, (tensor, param) in enumerate(zip(tensors, owners, strict=True)):
        if any(hasattr(tensor, mark) for mark in _FSDP1_MARKS):
            raise RuntimeError(
                f"alto_ds does not support parameter {names[param]}, which "
                "FullyShardedDataParallel (FSDP1) has flattened: a rank would see only its own "
                "part of several layers. Use torch.distributed.fsdp.fully_shard (FSDP2), "
                "DistributedDataParallel or DeepSpeed's ZeRO."
            )
        # Hugging Face Accelerate puts DTensors in place of plain parameters.
        layers.append(Layer(tensor if dtensor.is_dtensor(tensor) else param, names[param]))
        length, start = dtensor.local(tensor).numel(), dtensor.start_of(tensor)
        if length:
            fragments.append(Fragment(index, 0, length, start, index, whole=True))
    copies = any(a is not b for a, b in zip(tensors, owners, strict=True))
    return Layout(tuple(layers), tuple(fragments), master_copy=copies)


def _owners(
    tensors: Sequence[torch.Tensor], params: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor] | None:
    """The parameter that each tensor is or stands for."""
    if set(tensors) <= set(params):
        return tensors
    trainable = [p for p in params if p.requires_grad and p.numel() > 0]
    for owners in (params, trainable):
        if [p.shape for p in owners] == [tensor.shape for tensor in tensors]:
            return owners
    return None
