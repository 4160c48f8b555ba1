"""E in front of gradients that no one differentiated: a zeroth-order estimator and SGD.

    python examples/zeroth_order.py

Prints the loss with and without E. The estimator is that of SPSA and MeZO (Malladi et al., arXiv
2305.17333): along a random direction z the slope is (L(θ+εz) − L(θ−εz)) / 2ε, and slope · z stands
for the gradient. It takes forward passes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import byte_gpt2
import torch
from torch import Tensor

from alto_ds import E

STEPS, DIRECTIONS, EPSILON = 100, 4, 1e-3


@torch.no_grad()
def estimate_gradient(
    loss: Callable[[], Tensor], params: Sequence[Tensor], generator: torch.Generator
) -> float:
    """Set ``grad`` of each parameter to the mean of some estimates; return the mean loss."""
    total = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(DIRECTIONS):
        direction = [torch.randn(param.shape, generator=generator) for param in params]
        values = []
        for shift in (EPSILON, -2 * EPSILON):
            for param, z in zip(params, direction, strict=True):
                param.add_(z, alpha=shift)
            values.append(loss().item())
        slope = (values[0] - values[1]) / (2 * EPSILON)
        for param, z in zip(params, direction, strict=True):
            param.add_(z, alpha=EPSILON)
            assert param.grad is not None
            param.grad.add_(z, alpha=slope / DIRECTIONS)
        total += sum(values) / 2 / DIRECTIONS
    return total


def train(corrected: bool) -> list[float]:
    """Losses of all steps."""
    model = byte_gpt2.model()
    params = list(model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(params, lr=1e-3)
    if corrected:
        optimizer = E(optimizer, alpha=-5.0, beta=0.99)
    generator = torch.Generator().manual_seed(1234)
    losses = []
    batches = byte_gpt2.batches(batch_size=8)
    for _ in range(STEPS):
        tokens = next(batches)
        losses.append(
            estimate_gradient(lambda: model(tokens, labels=tokens).loss, params, generator)  # noqa: B023
        )
        optimizer.step()
    return losses


if __name__ == "__main__":
    for corrected in (False, True):
        losses = train(corrected)
        name = "E(SGD)" if corrected else "SGD"
        mean = sum(losses[-10:]) / 10
        print(f"{name}: loss {losses[0]:.3f} at first, {mean:.3f} over the last 10 steps")
