"""From sums of squares of fragments to trust ratios of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from alto_ds.layout import Layer


class TrustRatio(NamedTuple):
    """What scaled one layer's update.

    Attributes:
        ratio: factor on the learning rate; 1 for a layer that is not scaled.
        weight_norm: ‖θ‖, the 2-norm of the whole layer before the update.
        update_norm: ‖r‖, the 2-norm of the whole layer's update before it is scaled.
        scaled: whether the layer's group is one whose updates are scaled.
    """

    ratio: float
    weight_norm: float
    update_norm: float
    scaled: bool


def sums_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums of squares, float32 on devices that have no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def rows_to_add(layers: Sequence[Layer]) -> dict[ProcessGroup, torch.Tensor]:
    """The rows of those layers that the ranks of each process group share, int64 and ascending."""
    rows_of: dict[ProcessGroup, list[int]] = {}
    for row, layer in enumerate(layers):
        for group in layer.groups:
            rows_of.setdefault(group, []).append(row)
    return {group: torch.tensor(rows) for group, rows in rows_of.items()}


def add_over_ranks(sums: torch.Tensor, rows_of: Mapping[ProcessGroup, torch.Tensor]) -> None:
    """Add each layer's sums over the ranks that share it: one all-reduce per process group.

    Every rank of every group must call this together, with the same layers in the same order.
    Layers without a group take no part.

    Args:
        sums: ``[layers, ...]``, such as Σθ² and Σr² of this rank's fragments; changed in place.
        rows_of: from :func:`rows_to_add`.
    """
    for group, rows in rows_of.items():
        device = _collective_device(group, sums.device)
        if len(rows) == len(sums) and device == sums.device:
            dist.all_reduce(sums, group=group)
        else:
            rows = rows.to(sums.device)
            part = sums[rows].to(device)
            dist.all_reduce(part, group=group)
            sums[rows] = part.to(sums.device)


def _collective_device(group: ProcessGroup, device: torch.device) -> torch.device:
    """``device`` where the group's backend takes its tensors, else one that it takes.

    ZeRO-Offload keeps shards on the CPU while the process group may be NCCL only.
    """
    backends = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    if f"{device.type}:" in backends:
        return device
    if "cpu:" in backends:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise RuntimeError(
            f"alto_ds cannot add trust-ratio sums that lie on {device} over a process group with "
            f"backends {backends!r}: initialise the group with a backend for {device.type}, such "
            "as 'cpu:gloo,cuda:nccl'."
        )
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def trust_ratios(
    sums: torch.Tensor,
    eps2: float,
    eps3: float,
    clip: tuple[float, float] | None,
) -> torch.Tensor:
    """Return ``φ(‖θ‖) / (‖r‖ + ε2 φ(‖θ‖))`` with ``φ(x) = x + ε3``, and 1 where a norm is 0.

    The equation is the paper's Algorithm 2 (arXiv 2510.27153); the rule for 0 is LAMB's. Where a
    norm is NaN so is the ratio: a layer with one bad element must not go on as if it were well.

    Args:
        sums: ``[layers, 2]``, Σθ² and Σr² of whole layers.
        eps2: ε2, keeps the ratio finite where the update is small.
        eps3: ε3, lets weights of tiny norm move.
        clip: lowest and highest ratio, or None.

    Returns:
        ``[layers]``, of the dtype and on the device of ``sums``; no host synchronisation.
    """
    norms = sums.sqrt()
    weight_norm, update_norm = norms.unbind(1)
    phi = weight_norm + eps3
    ratio = phi / (update_norm + eps2 * phi)
    ratio = torch.where((weight_norm == 0) | (update_norm == 0), torch.ones_like(ratio), ratio)
    return ratio if clip is None else ratio.clamp(*clip)
