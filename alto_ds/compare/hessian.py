"""The largest eigenvalue of a loss's Hessian, by power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Yields scalars whose sum is the loss; called anew for each pass over the data.
Parts = Callable[[], Iterable[Tensor]]


class Eigenvalue(NamedTuple):
    """Of a symmetric matrix H.

    Attributes:
        value: λ = vᵀHv, with ‖v‖ = 1.
        residual: ‖Hv − λv‖. H has an eigenvalue that is at most this far from λ.
        products: of H and a vector that were computed.
    """

    value: float
    residual: float
    products: int


def largest_of_hessian(
    parts: Parts, params: Sequence[nn.Parameter], generator: torch.Generator
) -> Eigenvalue:
    """The largest eigenvalue of a loss's Hessian.

    Args:
        parts: of the loss, which must be the same at each call: of a model in evaluation mode.
        params: by which the loss is differentiated twice.
        generator: of the first vector, on the CPU.
    """
    start = torch.randn(sum(param.numel() for param in params), generator=generator)
    # Other kernels of attention have no second derivative, and neither have compiled models.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        return largest_eigenvalue(
            lambda vector: hessian_product(parts, params, vector), start.to(params[0].device)
        )


def hessian_product(parts: Parts, params: Sequence[nn.Parameter], vector: Tensor) -> Tensor:
    """The Hessian of a loss, times a vector: the gradient of (gradient · vector).

    Args:
        parts: of the loss.
        params: by which the loss is differentiated twice.
        vector: ``[elements of all params]``.

    Returns:
        The like.
    """
    total = torch.zeros_like(vector)
    for part in parts():
        gradient = _flat(
            torch.autograd.grad(part, params, create_graph=True, materialize_grads=True)
        )
        total += _flat(torch.autograd.grad(gradient @ vector, params, materialize_grads=True))
    return total


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-2, most: int = 100
) -> Eigenvalue:
    """The largest eigenvalue of a symmetric matrix, by power iteration.

    That finds the eigenvalue of the largest magnitude. Where it is a negative one, λ, the
    iteration is done once more with H − λ, whose eigenvalue of largest magnitude belongs to the
    largest one of H.

    Args:
        product: multiplies the matrix with a vector.
        start: first vector, ``[size]``, which must not be orthogonal to the eigenvector: random.
        tolerance: the iteration ends where residual ≤ tolerance · \\|λ\\|.
        most: products of one iteration.
    """
    found = _power_iteration(product, start, 0.0, tolerance, most)
    if found.value >= 0:
        return found
    shifted = _power_iteration(product, start, found.value, tolerance, most)
    return shifted._replace(products=found.products + shifted.products)


def _power_iteration(
    product: Callable[[Tensor], Tensor], start: Tensor, shift: float, tolerance: float, most: int
) -> Eigenvalue:
    """An eigenvalue of H: shift, and that of H − shift which has the largest magnitude."""
    vector = start / start.norm()
    count, value, residual = 0, 0.0, math.inf
    while residual > tolerance * abs(value) and count < most:
        count += 1
        image = product(vector)
        value = (vector @ image).item()
        residual = (image - value * vector).norm().item()
        image -= shift * vector
        vector = image / image.norm()
    return Eigenvalue(value, residual, count)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
