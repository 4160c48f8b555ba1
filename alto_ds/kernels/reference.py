"""The two passes in plain PyTorch: the definition that every other kernel is tested against.

Equations are those of Algorithm 2 in arXiv 2510.27153 with one change of variables. The paper
keeps ``a_k = β1 a_{k-1} + (1-β1)(g_k − g_{k-1})`` and the previous gradient. With the plain moving
average of the gradient, ``s_k = s_{k-1} + a_k``, it holds that ``a_k = (1-β1)(g_k − s_{k-1})``, so
``s`` replaces both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepSizes(NamedTuple):
    """The scalars of one step, the same for all elements of a tensor.

    Attributes:
        alpha: α, weight of the exploration average; 0 is LAMB.
        beta1: β1, decay of ``exp_avg_grad``.
        beta2: β2, decay of ``exp_avg``.
        beta3: β3, decay of ``exp_avg_sq``.
        correction2: ``1 − β2^k`` with k the number of this step, counted from 1; 1 without
            bias correction.
        correction3: ``1 − β3^k``, likewise.
        eps: ε1, added to the square root.
        weight_decay: λ.
    """

    alpha: float
    beta1: float
    beta2: float
    beta3: float
    correction2: float
    correction3: float
    eps: float
    weight_decay: float


def _update(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, sizes: StepSizes) -> Tensor:
    """Return ``r = m̂ / (√v̂ + ε1) + λθ``."""
    denominator = (exp_avg_sq / sizes.correction3).sqrt_().add_(sizes.eps)
    update = (exp_avg / sizes.correction2).div_(denominator)
    return update.add_(param, alpha=sizes.weight_decay) if sizes.weight_decay else update


def update_states(
    param: Tensor,
    grad: Tensor,
    exp_avg_grad: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sizes: StepSizes,
    sums: Tensor,
) -> None:
    """Pass 1: advance the states, then add this fragment's Σθ² and Σr² to ``sums``.

    Args:
        param: θ, any floating dtype; read only.
        grad: g, of the shape of ``param``; read only.
        exp_avg_grad: s, changed in place; None where α is 0, which needs no s.
        exp_avg: m, changed in place.
        exp_avg_sq: v, changed in place.
        sizes: the scalars of this step.
        sums: ``[2]``, changed in place.

    The states have the shape of ``param``; the arithmetic is done in their dtype.
    """
    param, grad = param.to(exp_avg.dtype), grad.to(exp_avg.dtype)
    if exp_avg_grad is not None:
        difference = grad - exp_avg_grad
        exp_avg_grad.add_(difference, alpha=1 - sizes.beta1)
        grad = difference.mul_(sizes.alpha * (1 - sizes.beta1)).add_(grad)
    exp_avg.lerp_(grad, 1 - sizes.beta2)
    exp_avg_sq.mul_(sizes.beta3).addcmul_(grad, grad, value=1 - sizes.beta3)
    sums += torch.stack(
        [
            _sum_of_squares(param, sums.dtype),
            _sum_of_squares(_update(param, exp_avg, exp_avg_sq, sizes), sums.dtype),
        ]
    )


def apply_update(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, sizes: StepSizes, step_size: Tensor
) -> None:
    """Pass 2: ``θ ← θ − step_size · r``, with r computed again from θ and the states.

    Args:
        param: θ, changed in place.
        exp_avg: m after pass 1.
        exp_avg_sq: v after pass 1.
        sizes: the scalars of pass 1.
        step_size: scalar tensor, learning rate times the layer's trust ratio.
    """
    update = _update(param.to(exp_avg.dtype), exp_avg, exp_avg_sq, sizes)
    param.sub_(update.mul_(step_size))


def _sum_of_squares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Σx² accumulated in ``dtype``."""
    return torch.linalg.vector_norm(x, dtype=dtype).square()
