"""Does a job fit, and which stage and micro batch to choose among those that do?"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from alto_ds.plan import activations
from alto_ds.plan.activations import Activations
from alto_ds.plan.duration import Speeds, seconds
from alto_ds.plan.job import Job
from alto_ds.plan.memory import Memory, memory
from alto_ds.pretrain.settings import ModelSettings

# What CUDA, NCCL and the gaps between tensors take besides; assumed.
BESIDES = 3 * 2**30
LARGEST_MICRO_BATCH = 64
SIMILAR = 1.1


class Plan(NamedTuple):
    """What a job takes.

    Attributes:
        job: what is trained.
        memory: of a rank.
        seconds: of a step, by what takes them.
        fits: into the GPU's memory.
    """

    job: Job
    memory: Memory
    seconds: dict[str, float]
    fits: bool


def plan(job: Job, speeds: Speeds) -> Plan:
    """The plan of one job."""
    needed = memory(job, activations_of(job, job.model.activation_checkpointing))
    fits = needed.peak + BESIDES <= speeds.gpu.gibibytes * 2**30
    return Plan(job, needed, dict(seconds(job, speeds)), fits)


def recommended(job: Job, speeds: Speeds) -> Plan | None:
    """A plan that fits, of all stages and micro batches, with and without checkpointing.

    Of those that take at most :data:`SIMILAR` times as long as the fastest, that of the lowest
    stage, without checkpointing if possible, and then of the largest micro batch: a collective's
    latency is not planned, and higher stages and smaller micro batches have more collectives.
    None where none fits.
    """
    found: list[Plan] = []
    for growing in alternatives(job):
        made = (plan(other, speeds) for other in growing)
        found += itertools.takewhile(lambda one: one.fits, made)
    shortest = min((sum(made.seconds.values()) for made in found), default=0.0)
    near = [made for made in found if sum(made.seconds.values()) <= SIMILAR * shortest]
    return min(near, key=_order, default=None)


def alternatives(job: Job) -> Iterator[Iterator[Job]]:
    """The job at other stages, and each with growing micro batches of the same global batch."""
    given = job.zero.model_dump(exclude_unset=True)
    # Its default is another one at stage 3.
    given.pop("overlap_comm", None)
    for stage in (3,) if job.offloads else (1, 2, 3):
        zero = DeepSpeedZeroConfig(**given | {"stage": stage})
        for again in (False, True):
            model = dataclasses.replace(job.model, activation_checkpointing=again)
            yield _growing(dataclasses.replace(job, zero=zero, model=model))


def _growing(job: Job) -> Iterator[Job]:
    micro = 1
    while micro <= LARGEST_MICRO_BATCH and job.batch_size % (micro * job.ranks) == 0:
        yield dataclasses.replace(job, micro_batch_size=micro)
        micro *= 2


def _order(made: Plan) -> tuple[int, bool, int]:
    job = made.job
    return int(job.zero.stage), job.model.activation_checkpointing, -job.micro_batch_size


def activations_of(job: Job, again: bool) -> Activations:
    """Of a micro step, where they are computed again for the gradient, or are not."""
    model = dataclasses.replace(job.model, activation_checkpointing=again)
    return _measured(model, job.vocab_size, job.dtype, job.micro_batch_size)


@functools.cache
def _measured(
    model: ModelSettings, vocab_size: int, dtype: torch.dtype, micro_batch_size: int
) -> Activations:
    return activations.measure(model, vocab_size, dtype, micro_batch_size)
