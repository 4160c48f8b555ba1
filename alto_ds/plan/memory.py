"""How much memory does a rank need?"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import NamedTuple

from alto_ds.layout.cut import part_size, pieces_of_slice, slice_size
from alto_ds.plan.activations import Activations
from alto_ds.plan.job import Job
from alto_ds.plan.traffic import gathering, persistent, sub_groups


class Memory(NamedTuple):
    """Bytes on the rank that needs most.

    Attributes:
        always: what stays, by name.
        phases: what comes on top in each phase of a step, by phase and name. Phases do not
            overlap.
        host: in the memory of the host, with offload.
    """

    always: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]

    @property
    def peak(self) -> int:
        """On the GPU, at most."""
        return sum(self.always.values()) + max(sum(p.values()) for p in self.phases.values())


def elements(job: Job) -> int:
    """Of a rank's master weights, and of each of its states, padding included."""
    if job.zero.stage < 3:
        return sum(slice_size(sizes, job.ranks) for sizes in job.sizes)
    return sum(part_size(size, job.ranks) for sizes in job.sizes for size in sizes)


def memory(job: Job, activations: Activations, reserved: bool = True) -> Memory:
    """Memory of one rank.

    Args:
        job: what is trained.
        activations: of a micro step.
        reserved: whether buffers take memory before they are written to, as on a GPU.
    """
    own, b = elements(job), job.dtype.itemsize
    of_optimizer = {"master weights": 4 * own}
    of_optimizer |= {name: size * own for name, size in job.states.items()}
    gradients = {"gradients": b * own, "gradients in fp32": 4 * own}
    host = of_optimizer | gradients if job.offloads else {}
    always = {} if job.offloads else of_optimizer
    # What is reduced at once lies in one buffer, in two where that overlaps with the backward pass.
    bucket = job.zero.reduce_bucket_size
    filled = b * min(bucket, job.numel)
    held = b * bucket if reserved else filled
    step = {} if job.offloads else _step(job, own)
    # The gradients in a bucket are copied, to be sent as one tensor.
    sent = {"gradients that are sent": filled}
    if job.zero.stage == 3:
        # On one rank a part is the whole layer, and is not copied.
        copied = b if job.ranks > 1 else 0
        gathered = gathering(job)
        prefetched = min(job.zero.prefetch_bucket_size, job.numel - gathered.peak)
        always |= {
            "weights": b * own,
            "whole small weights": copied * _persistent_elements(job),
            "gradients": 0 if job.offloads else b * own,
            "buffers of DeepSpeed": held if job.zero.contiguous_gradients else 0,
        }
        whole = {"whole weights": copied * (gathered.peak + max(prefetched, 0))}
        passes = whole | {"activations": activations.peak}
        phases = {"forward and backward": passes, "reduction": sent, "optimizer step": step}
    else:
        buffers = {"buffers of DeepSpeed": held * (2 if job.zero.overlap_comm else 1)}
        # Where activations take most, at the loss, they are empty.
        empty = buffers if reserved else {}
        always = {"weights": b * job.ranks * own} | always
        accumulated = b * (job.numel if job.zero.stage == 1 else _touched(job))
        kept = {"gradients": accumulated if job.accumulation > 1 else 0}
        phases = {
            "forward and backward": kept | empty | {"activations": activations.peak},
            "reduction": {"gradients": b * own} | buffers | sent,
            "optimizer step": step,
        }
    return Memory(always, phases, host)


def _touched(job: Job) -> int:
    """Elements of the layers of which a rank has a part: ZeRO-2 keeps their whole gradients."""
    return sum(_most_touched(tuple(sizes), job.ranks) for sizes in job.sizes)


@functools.cache
def _most_touched(sizes: tuple[int, ...], ranks: int) -> int:
    size = slice_size(sizes, ranks)
    places = list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))
    return max(
        sum(sizes[piece.layer] for piece in pieces_of_slice(places, size, rank))
        for rank in range(ranks)
    )


def _step(job: Job, own: int) -> dict[str, int]:
    """Gradients of a rank in the dtype of the model and, one flat tensor at a time, in fp32."""
    if job.zero.stage == 3:
        return {"gradients in fp32": 4 * max(sub_groups(job))}
    largest = max(slice_size(sizes, job.ranks) for sizes in job.sizes)
    return {"gradients": job.dtype.itemsize * own, "gradients in fp32": 4 * largest}


def _persistent_elements(job: Job) -> int:
    always = set(persistent(job))
    sizes = {key: size for module in job.modules for key, size in module.items()}
    return sum(size for key, size in sizes.items() if key in always)
