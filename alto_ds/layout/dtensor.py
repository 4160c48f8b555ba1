"""PyTorch's DTensor: which process groups hold the other parts, and where is this rank's part?

``fully_shard`` (FSDP2, also on meshes of two dimensions) and ``parallelize_module`` turn
parameters into DTensors. Each rank has a plain local tensor, of any size down to 0 and without
padding; gradients and optimizer states are DTensors too. ``torch.distributed.tensor`` is never
imported here, for that takes longer than all of alto_ds: whoever made a DTensor has done so.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, told without an import."""
    return hasattr(tensor, "device_mesh")


def groups_of(param: torch.Tensor, name: str) -> tuple[ProcessGroup, ...]:
    """The groups along those dimensions of the mesh that cut ``param``; none if it is no DTensor.

    Added over one after the other, the squares of the local parts become those of the whole: two
    dimensions of a mesh may cut the same dimension of the tensor or different ones.
    """
    if not is_dtensor(param):
        return ()
    mesh: Any = getattr(param, "device_mesh")  # noqa: B009  unknown to mypy
    placements: Any = getattr(param, "placements")  # noqa: B009  unknown to mypy
    groups = [
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate()
    ]
    return tuple(group for group in groups if dist.get_world_size(group) > 1)


def start_of(param: Any) -> int:
    """Where this rank's part begins in the flattened parameter, if it is one range of it.

    0 for parts that are no range, cut along an inner dimension.
    """
    if not is_dtensor(param):
        return 0
    utils: Any = sys.modules["torch.distributed.tensor"]._utils
    _, offset = utils.compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return 0 if any(offset[1:]) else offset[0] * param.shape[1:].numel() if offset else 0


def local(tensor: Any) -> torch.Tensor:
    """This rank's part of a parameter or state: a view, and the tensor itself if it is plain."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_grad(param: Any) -> torch.Tensor:
    """This rank's part of the gradient of ``param``, cut as the parameter is.

    Tensor parallelism leaves some gradients cut otherwise, or as one summand on each rank
    (LayerNorm under ``SequenceParallel``). All ranks of the mesh must then call this together.
    """
    grad = param.grad
    if is_dtensor(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)
