"""The training loop and the evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from alto_ds.pretrain.data.sequences import Sequences
from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.metrics import Metrics, alto_of, perplexity, trust_ratio_metrics
from alto_ds.pretrain.nonfinite import SkippedSteps, check_loss, check_weights
from alto_ds.pretrain.settings import Settings
from alto_ds.pretrain.signals import Interruption, drop_lost_output

# How a signal to any rank may end all of them; where both are wanted, the first.
STOPS = (ExitStatus.INTERRUPTED, ExitStatus.REQUEUE)


def train(
    engine: Any,
    data: Sequences,
    settings: Settings,
    step: int,
    metrics: Metrics,
    save: Callable[[int], None],
) -> tuple[int, ExitStatus]:
    """Train to the last step, or until a signal. All ranks must call this together.

    Args:
        engine: DeepSpeed's engine.
        data: training and held-out sequences.
        settings: of the run.
        step: number of steps that were done before.
        metrics: what each step is written to.
        save: writes a checkpoint; called on all ranks together with the number of steps done.

    Returns:
        Number of steps done, all of them saved, and FINISHED where that is ``settings.steps``;
        otherwise how the signal that has come to one of the ranks wants the run to end. The same
        on every rank.

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
    saved_at = time.monotonic()
    while step < settings.steps:
        began = time.perf_counter()
        # Dropout depends on step and rank alone, so that a resumed run repeats it.
        torch.manual_seed(settings.run.seed + step * world_size + rank)
        lr = engine.get_lr()[0]
        loss = _step(engine, batches, gas)
        step += 1
        # What all ranks must know of each other: the loss of each, whether one is to stop, and
        # whether rank 0's clock says that a checkpoint is due.
        minutes = (time.monotonic() - saved_at) / 60
        due = rank == 0 and minutes >= settings.run.save_minutes
        flags = [*(interruption.status is stop for stop in STOPS), due]
        shared = torch.cat([loss[None], torch.tensor(flags, dtype=loss.dtype, device=loss.device)])
        dist.all_reduce(shared)
        total_loss, *counts = shared.tolist()
        *wanted, due_minutes = (count > 0 for count in counts)
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
            "lr": lr,
        }
        norm = engine.get_global_grad_norm()
        if norm is not None:
            row["grad_norm"] = float(norm)
        row["tokens_per_second"] = tokens / (time.perf_counter() - began)
        last = step == settings.steps
        saves = bool(stop or due_minutes or last or step % settings.run.save_interval == 0)
        if saves:
            optimizer = alto_of(engine)
            if optimizer is not None:
                optimizer.raise_nonfinite()  # which on GPUs would be said only by the next step
            check_weights(engine.module, step)
        if step == settings.warmup_steps or step % settings.run.eval_interval == 0 or last:
            loss_held_out = evaluate(engine, data.validation)
            row |= {"val_loss": loss_held_out, "val_ppl": perplexity(loss_held_out)}
            row |= trust_ratio_metrics(engine)
        metrics.step(row)
        if saves:
            save(step)
            saved_at = time.monotonic()
        if stop is not None and not last:
            metrics.say(f"Stopped after step {step}; the same command goes on from there.")
            return step, stop  # and signals stay caught: a launcher sends more of them
    interruption.restore()
    return step, ExitStatus.FINISHED


def _step(engine: Any, batches: Iterator[Tensor], gas: int) -> Tensor:
    """One optimizer step; returns this rank's loss, a scalar in float32 on the device."""
    device = get_accelerator().current_device_name()
    total = torch.zeros((), device=device)
    for _ in range(gas):
        tokens = next(batches).to(device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach().float() / gas
    return total


@torch.no_grad()
def evaluate(engine: Any, sequences: Tensor) -> float:
    """Mean loss per predicted token, in nats; the same on every rank.

    All ranks must call this together. Under ZeRO-3 a forward pass is a collective, so a rank that
    has no sequence left repeats one and does not count it.

    Args:
        engine: DeepSpeed's engine.
        sequences: ``[sequences, seq_length]`` tokens, int64, on the CPU, the same on every rank.
    """
    engine.eval()
    device = get_accelerator().current_device_name()
    size = engine.train_micro_batch_size_per_gpu()
    mine = sequences[dist.get_rank() :: dist.get_world_size()]
    rounds = -(-len(sequences) // (dist.get_world_size() * size))
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(rounds):
        batch = mine[number * size : (number + 1) * size]
        tokens = (batch if len(batch) else sequences[:1]).to(device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        predicted = len(batch) * (tokens.shape[1] - 1)
        sums += torch.tensor([loss.item() * predicted, predicted], dtype=torch.float64)
    sums = sums.to(device)
    dist.all_reduce(sums)
    engine.train()
    return (sums[0] / sums[1]).item()
