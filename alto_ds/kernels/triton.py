"""The two passes in Triton, for CUDA and what else Triton reaches.

Each pass is one launch for all fragments of all tensors of a batch, whose addresses go to the
device in a table. Sums are deterministic: each program writes those of its block, and a second
launch adds the blocks of each fragment in order. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alto_ds.kernels.types import Batch, FragmentTable, Hyperparameters

_BLOCK = 2048  # elements of one program
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TYPE_OF = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of the table of fragments.
_COLUMNS = tl.constexpr(len(FragmentTable.COLUMNS))
_TENSOR = tl.constexpr(FragmentTable.COLUMNS.index("tensor"))
_OFFSET = tl.constexpr(FragmentTable.COLUMNS.index("offset"))
_LENGTH = tl.constexpr(FragmentTable.COLUMNS.index("length"))
_START = tl.constexpr(FragmentTable.COLUMNS.index("start"))
_LAYER = tl.constexpr(FragmentTable.COLUMNS.index("layer"))

_INFINITY = tl.constexpr(float("inf"))

# Not specialised on the values of numbers that differ from step to step: that would compile anew.
_VARYING = ["rounding_key", "rate1", "exploration", "scale2", "scale3"]


def supports(batch: Batch) -> bool:
    """Whether the batch's dtypes are among those of the kernels: arithmetic in float32."""
    param, exp_avg, exp_avg_sq = batch.dtypes()
    return (
        param in _FLOATS
        and batch.grads[0].dtype in _FLOATS
        and exp_avg in (torch.float32, torch.bfloat16)
        and exp_avg_sq == torch.float32
    )


def update_states(batch: Batch, hyper: Hyperparameters, sums: Tensor) -> None:
    """Pass 1; see :class:`alto_ds.kernels.types.Kernel`."""
    table = _on_device(batch.fragments, sums.device)
    if not len(table["blocks"]):
        return
    addresses = _addresses(batch, hyper)
    with torch.accelerator.device_index(sums.device.index):
        _update_states[(len(table["blocks"]),)](
            *(addresses, table["fragments"], table["blocks"], table["partial_sums"]),
            exploration=hyper.alpha * (1 - hyper.beta1),
            rate1=1 - hyper.beta1,
            rate2=1 - hyper.beta2,
            beta3=hyper.beta3,
            rate3=1 - hyper.beta3,
            rounding_key=hyper.rounding_key - 2**31,  # always an int32
            **_common(batch, hyper),
            GRAD=_TYPE_OF[batch.grads[0].dtype],
            CORRECT=hyper.alpha != 0,
            GUARD=hyper.guard,
            enable_fp_fusion=False,
        )
        _add_blocks[(len(table["fragments"]),)](
            *(table["fragments"], table["first_blocks"], table["partial_sums"], sums), BLOCKS=128
        )


def apply_update(batch: Batch, hyper: Hyperparameters, step_sizes: Tensor) -> None:
    """Pass 2; see :class:`alto_ds.kernels.types.Kernel`."""
    table = _on_device(batch.fragments, step_sizes.device)
    if not len(table["blocks"]):
        return
    addresses = _addresses(batch, hyper)
    with torch.accelerator.device_index(step_sizes.device.index):
        _apply_update[(len(table["blocks"]),)](
            *(addresses, table["fragments"], table["blocks"], step_sizes),
            **_common(batch, hyper),
            enable_fp_fusion=False,
        )


def _common(batch: Batch, hyper: Hyperparameters) -> dict[str, Any]:
    param, exp_avg, _ = batch.dtypes()
    return {
        "scale2": 1 / hyper.bias_correction2,
        "scale3": 1 / hyper.bias_correction3,
        "eps": hyper.eps[0],
        "weight_decay": hyper.weight_decay,
        "PARAM": _TYPE_OF[param],
        "STATE": _TYPE_OF[exp_avg],
        "BLOCK": _BLOCK,
        "num_warps": 4,
    }


def _on_device(fragments: FragmentTable, device: torch.device) -> dict[str, Tensor]:
    """The table on the device, with which block belongs to which fragment; made once."""
    if "fragments" not in fragments.on_device:
        blocks = (fragments.column("length") + _BLOCK - 1) // _BLOCK
        first = torch.cumsum(blocks, 0) - blocks
        owner = torch.repeat_interleave(torch.arange(len(blocks)), blocks)
        begin = (torch.arange(len(owner)) - first[owner]) * _BLOCK
        fragments.on_device |= {
            "fragments": fragments.rows.to(device),
            "blocks": torch.stack([owner, begin], 1).to(device),
            "first_blocks": torch.stack([first, first + blocks], 1).to(device),
            "partial_sums": torch.empty(len(owner), 2, dtype=torch.float64, device=device),
        }
    return fragments.on_device


def _addresses(batch: Batch, hyper: Hyperparameters) -> Tensor:
    """``[tensors, 5]``: where each tensor's θ, g, s, m and v begin, on the device.

    Copied again only where a tensor has moved, from pinned memory, so that nothing waits.
    """
    s_or_m = batch.exp_avg_grads if hyper.alpha else batch.exp_avgs
    columns = (batch.params, batch.grads, s_or_m, batch.exp_avgs, batch.exp_avg_sqs)
    rows = [list(row) for row in zip(*([t.data_ptr() for t in c] for c in columns), strict=True)]
    known = batch.fragments.addresses
    if known is None or known[0] != rows:
        device = batch.params[0].device
        pinned = torch.tensor(rows, pin_memory=device.type != "cpu")
        known = batch.fragments.addresses = (rows, pinned.to(device, non_blocking=True))
    return known[1]


@triton.jit
def _pointer(addresses, tensor, COLUMN: tl.constexpr, TYPE: tl.constexpr):
    return tl.load(addresses + tensor * 5 + COLUMN).to(tl.pointer_type(TYPE))


@triton.jit
def _update(param, exp_avg, exp_avg_sq, scale2, scale3, eps, weight_decay):
    """r = m̂ / (√v̂ + ε1) + λθ"""
    denominator = tl.sqrt_rn(exp_avg_sq * scale3) + eps
    return tl.div_rn(exp_avg * scale2, denominator) + param * weight_decay


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _cut(bits):
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_VARYING)
def _update_states(
    addresses,
    fragments,
    blocks,
    partial_sums,
    exploration,
    rate1,
    rate2,
    beta3,
    rate3,
    rounding_key,
    scale2,
    scale3,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    CORRECT: tl.constexpr,
    GUARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    fragment = fragments + _COLUMNS * tl.load(blocks + 2 * block)
    begin = tl.load(blocks + 2 * block + 1)
    tensor = tl.load(fragment + _TENSOR)
    length = tl.load(fragment + _LENGTH)
    place = begin + tl.arange(0, BLOCK)
    mask = place < length
    at = tl.load(fragment + _OFFSET) + place

    param = tl.load(_pointer(addresses, tensor, 0, PARAM) + at, mask, 0.0).to(tl.float32)
    grad = tl.load(_pointer(addresses, tensor, 1, GRAD) + at, mask, 0.0).to(tl.float32)
    exp_avg_grads = _pointer(addresses, tensor, 2, STATE) + at
    exp_avgs = _pointer(addresses, tensor, 3, STATE) + at
    exp_avg_sqs = _pointer(addresses, tensor, 4, tl.float32) + at
    exp_avg = tl.load(exp_avgs, mask, 0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sqs, mask, 0.0)
    exp_avg_grad = tl.zeros_like(exp_avg)

    if CORRECT:
        exp_avg_grad = tl.load(exp_avg_grads, mask, 0.0).to(tl.float32)
        difference = grad - exp_avg_grad
        exp_avg_grad = exp_avg_grad + difference * rate1
        grad = grad + difference * exploration
    exp_avg = exp_avg + (grad - exp_avg) * rate2
    exp_avg_sq = exp_avg_sq * beta3 + grad * grad * rate3
    # Before rounding, which may make a number of a NaN.
    fine = (exp_avg_sq < _INFINITY) & (tl.abs(exp_avg) < _INFINITY)

    if tl.bfloat16 == STATE:  # round_stochastically() in reference.py
        s_bits, m_bits = _bits(exp_avg_grad), _bits(exp_avg)
        x = (tl.load(fragment + _START) + place).to(tl.uint32) * 0x9E3779B9 + (
            rounding_key.to(tl.uint32) ^ 0x80000000
        )
        x = (x ^ s_bits ^ (m_bits << 15)) * 0x7FEB352D
        x = x ^ (x >> 16)
        exp_avg_grad = _cut(s_bits + (x >> 16))
        exp_avg = _cut(m_bits + (x & 0xFFFF))

    update = _update(param, exp_avg, exp_avg_sq, scale2, scale3, eps, weight_decay)
    weight, change = param.to(tl.float64), tl.where(mask, update, 0.0).to(tl.float64)
    weights, changes = tl.sum(weight * weight), tl.sum(change * change)
    if GUARD:
        bad = tl.where(mask & ~(fine & (tl.abs(update) < _INFINITY)), 1, 0)
        kept = tl.max(bad) > 0
        changes = tl.where(kept, float("nan"), changes)
        mask = place < tl.where(kept, 0, length)
    tl.store(partial_sums + 2 * block, weights)
    tl.store(partial_sums + 2 * block + 1, changes)

    if CORRECT:
        tl.store(exp_avg_grads, exp_avg_grad.to(STATE), mask)
    tl.store(exp_avgs, exp_avg.to(STATE), mask)
    tl.store(exp_avg_sqs, exp_avg_sq, mask)


@triton.jit
def _add_blocks(fragments, first_blocks, partial_sums, sums, BLOCKS: tl.constexpr):
    fragment = tl.program_id(0)
    first, end = tl.load(first_blocks + 2 * fragment), tl.load(first_blocks + 2 * fragment + 1)
    weight = tl.zeros((BLOCKS,), tl.float64)
    change = tl.zeros((BLOCKS,), tl.float64)
    for begin in range(first, end, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        weight += tl.load(partial_sums + 2 * block, block < end, 0.0)
        change += tl.load(partial_sums + 2 * block + 1, block < end, 0.0)
    # A layer has at most one fragment on a rank, so no other program writes here.
    layer = tl.load(fragments + _COLUMNS * fragment + _LAYER)
    sums += 2 * layer
    tl.store(sums, tl.load(sums) + tl.sum(weight))
    tl.store(sums + 1, tl.load(sums + 1) + tl.sum(change))


@triton.jit(do_not_specialize=_VARYING)
def _apply_update(
    addresses,
    fragments,
    blocks,
    step_sizes,
    scale2,
    scale3,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    fragment = fragments + _COLUMNS * tl.load(blocks + 2 * block)
    tensor = tl.load(fragment + _TENSOR)
    place = tl.load(blocks + 2 * block + 1) + tl.arange(0, BLOCK)
    step_size = tl.load(step_sizes + tl.load(fragment + _LAYER)).to(tl.float32)
    mask = place < tl.where(step_size == 0, 0, tl.load(fragment + _LENGTH))
    at = tl.load(fragment + _OFFSET) + place

    params = _pointer(addresses, tensor, 0, PARAM) + at
    param = tl.load(params, mask, 0.0).to(tl.float32)
    exp_avg = tl.load(_pointer(addresses, tensor, 3, STATE) + at, mask, 0.0).to(tl.float32)
    exp_avg_sq = tl.load(_pointer(addresses, tensor, 4, tl.float32) + at, mask, 0.0)
    update = _update(param, exp_avg, exp_avg_sq, scale2, scale3, eps, weight_decay)
    tl.store(params, (param - update * step_size).to(PARAM), mask)
