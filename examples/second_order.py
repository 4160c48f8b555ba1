"""E in front of a second-order optimizer: AdaHessian on a tiny GPT-2.

    python examples/second_order.py

Prints the loss with and without E. AdaHessian (Yao et al., arXiv 2006.00719) divides by a moving
average of the Hessian's diagonal where Adam has that of the squared gradient. The diagonal comes
from Hutchinson's estimate, D = z ⊙ Hz with random signs z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import byte_gpt2
import torch
from torch import Tensor
from torch.optim import Optimizer

from alto_ds import E

STEPS = 40


class AdaHessian(Optimizer):
    """AdaHessian without its averaging over blocks of a layer; ``curvature`` is set by the user."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.curvature: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(param), "d": torch.zeros_like(param)}
                state["step"] += 1
                state["m"].lerp_(param.grad, 1 - beta1)
                state["d"].lerp_(self.curvature[param].square(), 1 - beta2)
                m = state["m"] / (1 - beta1 ** state["step"])
                d = state["d"] / (1 - beta2 ** state["step"])
                param.sub_(m / (d.sqrt() + group["eps"]), alpha=group["lr"])


def gradient_and_curvature(loss: Tensor, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Set ``grad`` of each parameter and return the estimates of the Hessian's diagonal."""
    grads = torch.autograd.grad(loss, params, create_graph=True)
    signs = [torch.randint_like(param, 2) * 2 - 1 for param in params]
    products = torch.autograd.grad(grads, params, grad_outputs=signs)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.detach()
    return {p: z * hz for p, z, hz in zip(params, signs, products, strict=True)}


def train(corrected: bool) -> list[float]:
    """Losses of all steps."""
    model = byte_gpt2.model()
    params = list(model.parameters())
    base = AdaHessian(params)
    optimizer: Optimizer = E(base, alpha=-5.0, beta=0.99) if corrected else base
    losses = []
    batches = byte_gpt2.batches(batch_size=16)
    for _ in range(STEPS):
        tokens = next(batches)
        loss = model(tokens, labels=tokens).loss
        base.curvature = gradient_and_curvature(loss, params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for corrected in (False, True):
        losses = train(corrected)
        name = "E(AdaHessian)" if corrected else "AdaHessian"
        mean = sum(losses[-10:]) / 10
        print(f"{name}: loss {losses[0]:.3f} at first, {mean:.3f} over the last 10 steps")
