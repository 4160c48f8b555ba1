"""ALTO and E against the authors' package, and LAMB against a reference of a few lines.

Real gradients of a small GPT-2 in fp64. The authors' ALTO clips the global norm to 1.0 inside
``step()``; the model trained by ours is clipped before it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import alto_ds
from tests.models import byte_batches, decay_groups, relative_error, tiny_gpt2

authors_alto = pytest.importorskip("ALTO", reason="needs the package e-optimizer-adaptor")
authors_e = pytest.importorskip("E", reason="needs the package e-optimizer-adaptor")
pytest.importorskip("transformers")

STEPS = 200
# (α, β1): large batches, small batches, LAMB.
SETTINGS = [(-5.0, 0.99), (0.5, 0.01), (0.0, 0.9)]


def train_both(ours: Any, theirs: Any, model: Any, twin: Any, clip: bool = False) -> None:
    """Take the same steps with both optimizers, on the gradients of our model.

    On gradients of its own model each would follow a path of its own: training is chaotic, and
    differences of 1e-16 grow by a factor of 1e8 in 200 steps.
    """
    for _, batch in zip(range(STEPS), byte_batches(), strict=False):
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        for param, copied in zip(model.parameters(), twin.parameters(), strict=True):
            copied.grad = param.grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ours.step()
        theirs.step()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(found, expected) < 1e-10, name


@pytest.mark.parametrize(("alpha", "beta1"), SETTINGS)
def test_alto_equals_the_authors(alpha: float, beta1: float) -> None:
    model = tiny_gpt2()
    twin = copy.deepcopy(model)
    start = copy.deepcopy(model)
    betas, lr, eps, decay = (beta1, 0.9, 0.99), 2e-3, 1e-6, 1e-2
    ours = alto_ds.ALTO(
        decay_groups(model, weight_decay=decay), lr=lr, betas=betas, alpha=alpha, eps=eps
    )
    groups = decay_groups(twin, weight_decay=decay)
    for group in groups:  # the authors' class knows nothing of named parameters
        group["params"] = [param for _, param in group["params"]]
    theirs = authors_alto.ALTO(groups, lr=lr, betas=betas, alp=alpha, eps=eps)
    train_both(ours, theirs, model, twin, clip=True)
    assert relative_error(model.lm_head.weight, start.lm_head.weight) > 0.05


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_e_over_adamw_equals_the_authors(alpha: float, beta: float) -> None:
    model = tiny_gpt2()
    twin = copy.deepcopy(model)
    ours = alto_ds.E(torch.optim.AdamW(model.parameters(), lr=1e-3), alpha=alpha, beta=beta)
    theirs = authors_e.E(torch.optim.AdamW(twin.parameters(), lr=1e-3), alpha=alpha, beta=beta)
    train_both(ours, theirs, model, twin)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020, Algorithm 2) with φ the identity, written out for comparison."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            t = state["t"] = state.get("t", 0) + 1
            m = state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * p.grad
            v = state["v"] = 0.99 * state.get("v", torch.zeros_like(p)) + 0.01 * p.grad**2
            r = m / (1 - 0.9**t) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-6) + 0.01 * p
            ratio = p.norm() / r.norm() if p.norm() > 0 and r.norm() > 0 else 1.0
            p -= self.param_groups[0]["lr"] * ratio * r


def test_alpha_0_is_lamb() -> None:
    model = tiny_gpt2()
    twin = copy.deepcopy(model)
    ours = alto_ds.ALTO(model.parameters(), lr=2e-3, alpha=0.0, eps=1e-6, weight_decay=0.01)
    train_both(ours, Lamb(twin.parameters(), lr=2e-3), model, twin)
    state: dict[str, Tensor] = ours.state[next(model.parameters())]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
