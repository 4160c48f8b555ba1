"""The training loop and the evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from alto_ds.pretrain.data.sequences import Sequences
from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.metrics import (
    Metrics,
    alto_of,
    perplexity,
    trust_ratio_metrics,
    trust_ratios_of,
)
from alto_ds.pretrain.model import flops_per_token
from alto_ds.pretrain.nonfinite import (
    SkippedSteps,
    check_loss,
    check_weights,
    error_of,
    raise_together,
)
from alto_ds.pretrain.settings import Settings
from alto_ds.pretrain.signals import Interruption, drop_lost_output
from alto_ds.pretrain.speed import peak_memory, profiler, speed_metrics

# How a signal to any rank may end all of them; where both are wanted, the first.
STOPS = (ExitStatus.INTERRUPTED, ExitStatus.REQUEUE)


class Trained(NamedTuple):
    """How training has ended, the same on every rank.

    Attributes:
        step: number of steps done, all of them saved.
        status: FINISHED where that is ``settings.steps``; otherwise how the signal that has come
            to one of the ranks wants the run to end.
        loss_held_out: of the last step; None where there was none to do.
    """

    step: int
    status: ExitStatus
    loss_held_out: float | None


def train(
    engine: Any,
    data: Sequences,
    settings: Settings,
    step: int,
    metrics: Metrics,
    save: Callable[[int], None],
) -> Trained:
    """Train to the last step, or until a signal. All ranks must call this together.

    Args:
        engine: DeepSpeed's engine.
        data: training and held-out sequences.
        settings: of the run.
        step: number of steps that were done before.
        metrics: what each step is written to.
        save: writes a checkpoint; called on all ranks together with the number of steps done.

    Raises:
        FloatingPointError: on all ranks, where a step has made loss or weights that are not finite
            or too many steps in a row were skipped. Nothing of the step was written.
    """
    interruption = Interruption()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch_size, gas = engine.train_batch_size(), engine.gradient_accumulation_steps()
    batches = data.training_batches(step, batch_size, gas, rank, world_size)
    tokens = batch_size * settings.model.length
    skipped_steps = SkippedSteps(engine, settings.run.max_skipped_steps)
    flops = tokens * flops_per_token(engine.module, settings.model.length) / world_size
    profile = profiler(settings.run, rank)
    loss_held_out = None
    first, saved_at = step, time.monotonic()
    while step < settings.steps:
        began = time.perf_counter()
        # Dropout depends on step and rank alone, so that a resumed run repeats it.
        torch.manual_seed(settings.run.seed + step * world_size + rank)
        lr = engine.get_lr()[0]
        loss, error = _step(engine, batches, gas)
        step += 1
        # What all ranks must know of each other: the loss of each, whether one is to stop, whether
        # rank 0's clock says that a checkpoint is due, and whether a rank has a number that is not
        # finite: where no layer is shared, as at ZeRO 0, its optimizer alone has raised it.
        minutes = (time.monotonic() - saved_at) / 60
        due = rank == 0 and minutes >= settings.run.save_minutes
        flags = [*(interruption.status is stop for stop in STOPS), due, error is not None]
        shared = torch.cat([loss[None], torch.tensor(flags, dtype=loss.dtype, device=loss.device)])
        dist.all_reduce(shared)
        total_loss, *counts = shared.tolist()
        *wanted, due_minutes, failed = (count > 0 for count in counts)
        if failed:
            raise_together(error)
        stop = next(
            (status for status, is_wanted in zip(STOPS, wanted, strict=True) if is_wanted), None
        )
        check_loss(total_loss / world_size, step)
        skipped_steps.check(step)
        if stop is not None:
            drop_lost_output()
        row = {
            "step": step,
            "tokens": step * tokens,
            "loss": total_loss / world_size,
            "ppl": perplexity(total_loss / world_size),
            "lr": lr,
        }
        norm = engine.get_global_grad_norm()
        if norm is not None:
            row["grad_norm"] = float(norm)
        if engine.fp16_enabled():
            row["loss_scale"] = float(engine.optimizer.loss_scale)
        row |= speed_metrics(tokens, flops, time.perf_counter() - began, step - first)
        row["memory_gib"] = peak_memory() / 2**30
        profile.step()
        last = step == settings.steps
        saves = bool(stop or due_minutes or last or step % settings.run.save_interval == 0)
        if saves:
            optimizer = alto_of(engine)
            if optimizer is not None:
                # On GPUs only the next step would say it.
                raise_together(error_of(optimizer.raise_nonfinite))
            check_weights(engine.module, step)
        if step == settings.warmup_steps or step % settings.run.eval_interval == 0 or last:
            loss_held_out = evaluate(engine, data.validation)
            row |= {"val_loss": loss_held_out, "val_ppl": perplexity(loss_held_out)}
            ratios = trust_ratios_of(engine)
            if ratios is not None:
                row |= trust_ratio_metrics(ratios)
                row |= {"trust_ratios": ratios} if settings.run.trust_ratios_by_layer else {}
        metrics.step(row)
        if saves:
            save(step)
            saved_at = time.monotonic()
        if stop is not None and not last:
            metrics.say(f"Stopped after step {step}; the same command goes on from there.")
            profile.close()
            # Signals stay caught: a launcher sends more of them.
            return Trained(step, stop, None)
    profile.close()
    interruption.restore()
    return Trained(step, ExitStatus.FINISHED, loss_held_out)


def _step(
    engine: Any, batches: Iterator[Tensor], gas: int
) -> tuple[Tensor, FloatingPointError | None]:
    """One optimizer step.

    Returns:
        This rank's loss, a scalar in float32 on the device, and what the optimizer has raised.
    """
    device = get_accelerator().current_device_name()
    total, error = torch.zeros((), device=device), None
    for _ in range(gas):
        tokens = get_accelerator().pin_memory(next(batches)).to(device, non_blocking=True)
        loss = engine(tokens, tokens)
        engine.backward(loss)
        total += loss.detach().float() / gas
        error = error or error_of(engine.step)
    return total, error


@torch.no_grad()
def evaluate(engine: Any, sequences: Tensor) -> float:
    """Mean loss per predicted token, in nats; the same on every rank.

    All ranks must call this together. Not compiled: that would take longer than a small run's
    evaluations. Under ZeRO-3 a forward pass is a collective, so a rank that has no sequence left
    repeats one and does not count it.

    Args:
        engine: DeepSpeed's engine.
        sequences: ``[sequences, seq_length]`` tokens, int64, on the CPU, the same on every rank.
    """
    engine.eval()
    device = get_accelerator().current_device_name()
    size = engine.train_micro_batch_size_per_gpu()
    mine = sequences[dist.get_rank() :: dist.get_world_size()]
    rounds = -(-len(sequences) // (dist.get_world_size() * size))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.compiler.set_stance("force_eager"):
        for number in range(rounds):
            batch = mine[number * size : (number + 1) * size]
            tokens = (batch if len(batch) else sequences[:1]).to(device)
            predicted = len(batch) * (tokens.shape[1] - 1)
            sums[0] += engine(tokens, tokens).double() * predicted
            sums[1] += predicted
    dist.all_reduce(sums)
    engine.train()
    return (sums[0] / sums[1]).item()
