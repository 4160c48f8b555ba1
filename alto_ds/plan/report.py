"""A plan in words and numbers."""

from __future__ import annotations

from typing import Any

from alto_ds.plan.choice import BESIDES, LARGEST_MICRO_BATCH, Plan, activations_of
from alto_ds.plan.duration import Speeds
from alto_ds.plan.memory import elements
from alto_ds.plan.traffic import traffic

GIB = 2**30


def as_dict(made: Plan, speeds: Speeds, best: Plan | None) -> dict[str, Any]:
    """All figures: bytes, seconds, and numbers."""
    job, memory = made.job, made.memory
    step = sum(made.seconds.values())
    found: dict[str, Any] = {
        "parameters": job.numel,
        "layers": sum(map(len, job.sizes)),
        "ranks": job.ranks,
        "zero_stage": int(job.zero.stage),
        "train_batch_size": job.batch_size,
        "train_micro_batch_size_per_gpu": job.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "tokens_per_step": job.tokens,
        "elements_per_rank": elements(job),
        "memory": {
            "always": dict(memory.always),
            "phases": {name: dict(phase) for name, phase in memory.phases.items()},
            "host": dict(memory.host),
            "cuda_and_nccl": BESIDES,
            "peak": memory.peak + BESIDES,
            "gpu": int(speeds.gpu.gibibytes * GIB),
            "activations": activations_of(job, False)._asdict(),
            "activations_with_checkpointing": activations_of(job, True)._asdict(),
        },
        "fits": made.fits,
        "traffic": [t._asdict() | {"sent_by_a_rank": t.sent(job.ranks)} for t in traffic(job)],
        "seconds": made.seconds,
        "seconds_per_step": step,
        "tokens_per_second": job.tokens / step,
    }
    if job.steps is not None:
        found |= {
            "steps": job.steps,
            "days": step * job.steps / 86400,
            "gpu_hours": step * job.steps * job.ranks / 3600,
        }
    found["assumed"] = {
        "mfu": speeds.mfu,
        "flops": speeds.gpu.flops,
        "memory_bytes_per_second": speeds.gpu.bandwidth,
        "link_bytes_per_second": speeds.link(job),
    }
    found["recommended"] = None if best is None else _choice(best)
    return found


def as_text(figures: dict[str, Any]) -> str:
    """The same for people, as produced by :func:`as_dict`."""
    memory, f = figures["memory"], figures
    phase = max(memory["phases"], key=lambda name: sum(memory["phases"][name].values()))
    again = memory["activations_with_checkpointing"]
    lines = [
        f"{f['parameters']:,} parameters in {f['layers']} layers on {f['ranks']:,} GPUs, "
        f"ZeRO-{f['zero_stage']}",
        f"a step: {f['train_batch_size']:,} sequences, {f['tokens_per_step']:,} tokens = "
        f"{f['ranks']:,} GPUs x {f['gradient_accumulation_steps']:,} micro steps x "
        f"{f['train_micro_batch_size_per_gpu']} sequences",
        "",
        "memory of a GPU, GiB",
        *_rows(memory["always"], GIB),
        *_rows({f"{name} ({phase})": n for name, n in memory["phases"][phase].items()}, GIB),
        *_rows({"CUDA, NCCL, gaps (assumed)": memory["cuda_and_nccl"]}, GIB),
        *_rows({"at most": memory["peak"], "there are": memory["gpu"]}, GIB),
        "activations at most (kept for the gradient), without torch.compile, which needs less:",
        f"  {_activations(memory['activations'])} without checkpointing, {_activations(again)} "
        "with it",
    ]
    if memory["host"]:
        lines += ["", "memory of the host for each GPU, GiB", *_rows(memory["host"], GIB)]
    lines += ["", "communication of a step, GB", *_rows(_by_name(f["traffic"]), 1e9)]
    lines += ["", "time of a step, s", *_rows(f["seconds"], 1)]
    lines += _rows({"in all": f["seconds_per_step"]}, 1)
    lines.append(f"  {f['tokens_per_second']:,.0f} tokens a second")
    if "days" in f:
        lines.append(
            f"  {f['steps']:,} steps take {f['days']:.3g} days, {f['gpu_hours']:,.0f} GPU hours"
        )
    assumed = f["assumed"]
    lines += [
        f"assumed: {assumed['mfu']:.0%} of {assumed['flops'] / 1e12:,.0f} TFLOP/s (MFU), "
        f"{assumed['memory_bytes_per_second'] / 1e12:.2f} TB/s of memory, "
        f"{assumed['link_bytes_per_second'] / 1e9:,.0f} GB/s between GPUs; nothing overlaps; no "
        "evaluation, no checkpoints",
        "",
        _verdict(f),
    ]
    return "\n".join(lines)


def _choice(best: Plan) -> dict[str, Any]:
    return {
        "zero_stage": int(best.job.zero.stage),
        "train_micro_batch_size_per_gpu": best.job.micro_batch_size,
        "activation_checkpointing": best.job.model.activation_checkpointing,
        "seconds_per_step": sum(best.seconds.values()),
        "peak": best.memory.peak + BESIDES,
    }


def _verdict(figures: dict[str, Any]) -> str:
    best = figures["recommended"]
    fits = "It fits." if figures["fits"] else "It does not fit."
    if best is None:
        return (
            f"{fits} No stage and micro batch does: take more or larger GPUs, or write "
            '"offload_optimizer": {"device": "cpu"} in "zero_optimization".'
        )
    how = "with" if best["activation_checkpointing"] else "without"
    return (
        f"{fits} Recommended, of micro batches up to {LARGEST_MICRO_BATCH}: "
        f'"stage": {best["zero_stage"]}, "train_micro_batch_size_per_gpu": '
        f"{best['train_micro_batch_size_per_gpu']}, {how} --activation_checkpointing: "
        f"{best['peak'] / GIB:.1f} GiB, {best['seconds_per_step']:.3g} s a step."
    )


def _rows(values: dict[str, Any], unit: float) -> list[str]:
    return [f"  {name:<52} {value / unit:>12,.3f}" for name, value in values.items()]


def _by_name(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"{t['collective']} of {t['what']}": t["bytes"] for t in found}


def _activations(found: dict[str, int]) -> str:
    return f"{found['peak'] / GIB:.2f} ({found['kept'] / GIB:.2f}) GiB"
