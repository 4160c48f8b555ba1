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
from alto_ds.pretrain.metrics import Metrics, perplexity, trust_ratio_metrics
from alto_ds.pretrain.settings import Settings
from alto_ds.pretrain.signals import Interruption


def train(
    engine: Any,
    data: Sequences,
    settings: Settings,
    step: int,
    metrics: Metrics,
    save: Callable[[int], None],
) -> int:
    """Train to the last step, or until a signal. All ranks must call this together.

    Args:
        engine: DeepSpeed's engine.
        data: training and held-out sequences.
        settings: of the run.
        step: number of steps that were done before.
        metrics: what each step is written to.
        save: writes a checkpoint; called on all ranks together with the number of steps done.

    Returns:
        Number of steps done, the same on every rank; all of them are saved. Fewer than
        ``settings.steps`` where SIGINT or SIGTERM has come to one of the ranks.
    """
    interruption = Interruption()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch_size, gas = engine.train_batch_size(), engine.gradient_accumulation_steps()
    batches = data.training_batches(step, batch_size, gas, rank, world_size)
    tokens = batch_size * settings.model.length
    while step < settings.steps:
        began = time.perf_counter()
        # Dropout depends on step and rank alone, so that a resumed run repeats it.
        torch.manual_seed(settings.run.seed + step * world_size + rank)
        lr = engine.get_lr()[0]
        loss = _step(engine, batches, gas)
        step += 1
        # What all ranks must know of each other: the loss of each, and whether one is to stop.
        shared = torch.stack([loss, torch.full_like(loss, interruption.requested)])
        dist.all_reduce(shared)
        stop = shared[1].item() > 0
        row = {
            "step": step,
            "tokens": step * tokens,
            "loss": shared[0].item() / world_size,
            "lr": lr,
        }
        norm = engine.get_global_grad_norm()
        if norm is not None:
            row["grad_norm"] = float(norm)
        row["tokens_per_second"] = tokens / (time.perf_counter() - began)
        last = step == settings.steps
        if step == settings.warmup_steps or step % settings.run.eval_interval == 0 or last:
            loss_held_out = evaluate(engine, data.validation)
            row |= {"val_loss": loss_held_out, "val_ppl": perplexity(loss_held_out)}
            row |= trust_ratio_metrics(engine)
        metrics.step(row)
        if stop or step % settings.run.save_interval == 0 or last:
            save(step)
        if stop and not last:
            metrics.say(f"Stopped after step {step}; the same command goes on from there.")
            return step  # and signals stay caught: a launcher sends more of them
    interruption.restore()
    return step


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
