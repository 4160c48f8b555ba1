"""How long does a step take, by the speeds that are assumed?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from alto_ds.plan.job import Job
from alto_ds.plan.memory import elements
from alto_ds.plan.traffic import traffic
from alto_ds.pretrain.speed import PEAKS
from alto_ds.states import EXP_AVG, EXP_AVG_SQ


class Gpu(NamedTuple):
    """What the makers say of a GPU.

    Attributes:
        gibibytes: of memory, as ``nvidia-smi`` shows them.
        flops: operations a second with matrices in bf16, dense.
        bandwidth: bytes a second of its memory.
        link: bytes a second to the other GPUs of a node, one way.
    """

    gibibytes: float
    flops: float
    bandwidth: float
    link: float


GPUS = {
    "h200": Gpu(140.4, PEAKS["H200"], 4.8e12, 450e9),
    "h100": Gpu(79.6, PEAKS["H100"], 3.35e12, 450e9),
    "a100": Gpu(80.0, PEAKS["A100"], 2.0e12, 300e9),
    "l40s": Gpu(45.0, PEAKS["L40S"], 0.86e12, 32e9),
    "l4": Gpu(22.5, PEAKS["L4"], 0.3e12, 32e9),
}
PCIE = 25e9  # bytes a second between a GPU and its host, where states are offloaded
HOST = 100e9  # bytes a second of a host's memory, for each GPU


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a plan takes for granted.

    Attributes:
        gpu: of :data:`GPUS`.
        mfu: share of the GPU's operations that forward and backward pass reach.
        network: bytes a second of each GPU to other nodes, one way.
    """

    gpu: Gpu
    mfu: float = 0.4
    network: float = 50e9

    def link(self, job: Job) -> float:
        """Bytes a second that each rank sends in a ring of all ranks.

        A ring crosses each network card of a node once; there is one for each GPU, and NCCL makes
        as many rings as there are cards.
        """
        if job.ranks == job.gpus_per_node:
            return self.gpu.link
        return min(self.gpu.link, self.network * job.gpus_per_node)


def seconds(job: Job, speeds: Speeds) -> Mapping[str, float]:
    """Seconds of a step by what takes them, one after the other: nothing overlaps."""
    tokens = job.tokens / job.ranks
    # Blocks are computed once more where their activations are not kept.
    repeated = 4 / 3 if job.model.activation_checkpointing else 1
    link = speeds.link(job)
    found = {
        "forward and backward": tokens * job.flops * repeated / (speeds.gpu.flops * speeds.mfu)
    }
    found |= {f"{t.collective} of {t.what}": t.sent(job.ranks) / link for t in traffic(job)}
    moved = elements(job) * _moved(job)
    if job.offloads:
        found["gradients and weights between GPU and host"] = (
            elements(job) * 2 * job.dtype.itemsize / PCIE
        )
        found["optimizer, on the host"] = moved / HOST
    else:
        found["optimizer"] = moved / speeds.gpu.bandwidth
    return found


def _moved(job: Job) -> int:
    """Bytes that the optimizer reads and writes for an element."""
    states = sum(job.states.values())
    once = 8 + 2 * states + 4  # weight and gradient, states in and out, weight
    if not job.all_reduce:
        return once
    # Known norms let the weight be written only in a second pass over weight, m and v.
    return once + 4 + job.states[EXP_AVG] + job.states[EXP_AVG_SQ]
