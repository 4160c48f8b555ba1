"""Tensors that are not cut by data parallelism: parameters, or whole master copies of them.

Covers one process, ``DistributedDataParallel``, ZeRO stage 0 and DeepSpeed's
``FP16_UnfusedOptimizer`` (stage 0 with fp16 or bf16), which puts an fp32 copy of each trainable
parameter in the parameter's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alto_ds.layout import tensor_parallel
from alto_ds.layout.types import Fragment, Layer, Layout, Names

# Attributes of DTensor, of FSDP1's flat parameters, and of the parameters it shows in their place.
# By attribute, for importing torch.distributed.tensor takes longer than all of alto_ds.
_FSDP_MARKS = ("device_mesh", "_is_flat_param", "_fsdp_flattened")


def resolve(
    tensors: Sequence[torch.Tensor], params: Sequence[torch.Tensor], names: Names
) -> list[Layout] | None:
    """See :func:`alto_ds.layout.resolve`; None where a tensor is neither parameter nor copy."""
    own = set(params)
    if all(tensor in own for tensor in tensors):
        owners = list(tensors)
    else:
        owners = [p for p in params if p.requires_grad and p.numel() > 0]
        if [p.shape for p in owners] != [tensor.shape for tensor in tensors]:
            return None
    for tensor, param in zip(tensors, owners, strict=True):
        if any(hasattr(tensor, mark) for mark in _FSDP_MARKS):
            raise RuntimeError(
                f"alto_ds does not support parameter {names[param]}, which FSDP or DTensor "
                "(fully_shard, parallelize_module) has sharded: a rank would see only its own "
                "part of the layer. Use DistributedDataParallel or DeepSpeed's ZeRO."
            )
    return [
        Layout(
            layers=(Layer(param, names[param], tensor_parallel.groups_of(param, names[param])),),
            fragments=(Fragment(layer=0, start=0, length=tensor.numel(), offset=0),),
            master_copy=tensor is not param,
        )
        for tensor, param in zip(tensors, owners, strict=True)
    ]
