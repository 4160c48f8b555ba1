"""The two passes in plain PyTorch: the definition that every other kernel is tested against.

Equations are those of Algorithm 2 in arXiv 2510.27153 with one change of variables. The paper
keeps ``a_k = β1 a_{k-1} + (1-β1)(g_k − g_{k-1})`` and the previous gradient. With the plain moving
average of the gradient, ``s_k = s_{k-1} + a_k``, it holds that ``a_k = (1-β1)(g_k − s_{k-1})``, so
``s`` replaces both.

Every operation below is rounded by itself. Kernels that do the same operations in the same order,
none of them fused, give the same states bitwise. Weights may differ in the last bits: sums have
another order, and PyTorch's own square root on CPUs is not always rounded correctly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alto_ds.kernels.types import Batch, Hyperparameters

_32_BITS = 0xFFFFFFFF


def update_states(batch: Batch, hyper: Hyperparameters, sums: Tensor) -> None:
    """Pass 1; see :class:`alto_ds.kernels.types.Kernel`."""
    averages = [batch.exp_avg_grads] if hyper.alpha else []
    columns = [batch.params, batch.grads, *averages, batch.exp_avgs, batch.exp_avg_sqs]
    for f in batch.fragments.fragments():
        part = slice(f.offset, f.offset + f.length)
        param, grad, *states = (_part(column[f.tensor], part) for column in columns)
        dtype = states[-1].dtype
        new = _advanced(grad.to(dtype), states, f.start, hyper)
        update = _update(param.to(dtype), new[-2], new[-1], hyper)
        squares = torch.stack(
            [_sum_of_squares(x, sums.dtype) for x in (param.to(dtype), update)],
        )
        if hyper.guard:
            # v is looked at, too: where it alone is infinite, r is m / ∞ = 0.
            fine = squares.isfinite().all() & new[-1].isfinite().all()
            squares = squares.where(fine, torch.nan)
            new = [x.where(fine, old.to(dtype)) for x, old in zip(new, states, strict=True)]
        sums[f.layer] += squares
        for state, value in zip(states, new, strict=True):
            state.copy_(value)


def apply_update(batch: Batch, hyper: Hyperparameters, step_sizes: Tensor) -> None:
    """Pass 2; see :class:`alto_ds.kernels.types.Kernel`."""
    for f in batch.fragments.fragments():
        part = slice(f.offset, f.offset + f.length)
        param = _part(batch.params[f.tensor], part)
        exp_avg_sq = _part(batch.exp_avg_sqs[f.tensor], part)
        exp_avg = _part(batch.exp_avgs[f.tensor], part).to(exp_avg_sq.dtype)
        update = _update(param.to(exp_avg_sq.dtype), exp_avg, exp_avg_sq, hyper)
        size = step_sizes[f.layer]
        param.sub_(update.mul_(size).where(size != 0, 0))


def _advanced(
    grad: Tensor, states: Sequence[Tensor], start: int, hyper: Hyperparameters
) -> list[Tensor]:
    """The next s, unless α is 0, m and v, of v's dtype; rounded where the states are bfloat16."""
    *exp_avg_grads, exp_avg, exp_avg_sq = states
    dtype = exp_avg_sq.dtype
    next_s = None
    if exp_avg_grads:
        s = exp_avg_grads[0].to(dtype)
        difference = grad - s
        next_s = s + difference * (1 - hyper.beta1)
        grad = grad + difference * (hyper.alpha * (1 - hyper.beta1))
    m = exp_avg.to(dtype)
    m = m + (grad - m) * (1 - hyper.beta2)
    v = (exp_avg_sq * hyper.beta3).add_((grad * grad).mul_(1 - hyper.beta3))
    if exp_avg.dtype == torch.bfloat16:
        next_s, m = round_stochastically(next_s, m, start, hyper.rounding_key)
    return [x.to(dtype) for x in (next_s, m, v) if x is not None]


def round_stochastically(
    exp_avg_grad: Tensor | None, exp_avg: Tensor, start: int, key: int
) -> tuple[Tensor | None, Tensor]:
    """Stochastic rounding of states to what bfloat16 holds, right in the mean.

    To the bits of a number a random one of sixteen bits is added before the lower sixteen are cut
    off. The random number is a hash of the element's place in its layer, of the values themselves
    and of ``key``, so that it does not depend on how layers are cut or on which rank holds them.

    Args:
        exp_avg_grad: s, of any float dtype, taken as float32; None where α is 0.
        exp_avg: m, likewise.
        start: place of the first element in the flattened layer.
        key: 32 random bits, new in every step.

    Returns:
        s and m, float32.
    """
    m_bits = exp_avg.float().view(torch.int32).to(torch.int64) & _32_BITS
    s_bits = torch.zeros_like(m_bits)
    if exp_avg_grad is not None:
        s_bits = exp_avg_grad.float().view(torch.int32).to(torch.int64) & _32_BITS
    place = torch.arange(start, start + exp_avg.numel(), device=exp_avg.device) & _32_BITS
    x = (place * 0x9E3779B9 + key).reshape(exp_avg.shape)
    x = (x ^ s_bits ^ (m_bits << 15)) & _32_BITS
    x = (x * 0x7FEB352D) & _32_BITS
    x ^= x >> 16
    m = ((m_bits + (x & 0xFFFF)) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    if exp_avg_grad is None:
        return None, m
    return ((s_bits + (x >> 16)) & 0xFFFF0000).to(torch.int32).view(torch.float32), m


def _update(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyperparameters) -> Tensor:
    """Return ``r = m̂ / (√v̂ + ε1) + λθ``."""
    denominator = (exp_avg_sq * (1 / hyper.bias_correction3)).sqrt_().add_(hyper.eps[0])
    update = (exp_avg * (1 / hyper.bias_correction2)).div_(denominator)
    return update.add_(param * hyper.weight_decay)


def _part(tensor: Tensor, part: slice) -> Tensor:
    """The elements ``part`` of a tensor, which is flat unless they are all of it."""
    return tensor if part == slice(0, tensor.numel()) else tensor[part]


def _sum_of_squares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Σx² accumulated in ``dtype``."""
    return torch.linalg.vector_norm(x, dtype=dtype).square()
