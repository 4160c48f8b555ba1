"""A run that changes from another optimizer to ALTO goes on from that optimizer's states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from alto_ds import ALTO
from alto_ds.conversions import from_adam, from_authors
from tests.models import byte_batches, relative_error, tiny_gpt2

pytest.importorskip("transformers")


def train(optimizer: Any, model: Any, batches: Any, steps: int, twin: Any = None) -> None:
    """Take steps; a twin gets the same gradients, clipped to 1 as the authors do in step()."""
    for _, batch in zip(range(steps), batches, strict=False):
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        if twin is not None:
            other, other_optimizer = twin
            for param, own in zip(other.parameters(), model.parameters(), strict=True):
                param.grad = own.grad.clone()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            other_optimizer.step()
        optimizer.step()


@pytest.mark.parametrize(("alpha", "beta1"), [(-5.0, 0.99), (0.5, 0.01)])
def test_a_run_of_the_authors_goes_on_as_they_would(alpha: float, beta1: float) -> None:
    authors = pytest.importorskip("ALTO", reason="needs the package e-optimizer-adaptor").ALTO
    settings = {"betas": (beta1, 0.9, 0.99), "eps": 1e-6, "weight_decay": 1e-2}
    model, batches = tiny_gpt2(), byte_batches()
    theirs = authors(model.parameters(), lr=2e-3, alp=alpha, **settings)
    train(theirs, model, batches, 10)
    ours_model = copy.deepcopy(model)
    ours = ALTO(ours_model.parameters())  # all settings come with the states
    ours.load_state_dict(from_authors(copy.deepcopy(theirs.state_dict()), ours.state_dict()))
    start = copy.deepcopy(model)
    train(theirs, model, batches, 10, (ours_model, ours))
    assert relative_error(model.lm_head.weight, start.lm_head.weight) > 1e-3
    for found, expected in zip(ours_model.parameters(), model.parameters(), strict=True):
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("alpha", [-5.0, 0.0])
def test_moments_and_steps_of_adamw_are_taken_over_and_s_started(alpha: float) -> None:
    model, batches = tiny_gpt2(), byte_batches()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.99))
    train(adamw, model, batches, 7)
    optimizer = ALTO(model.parameters(), alpha=alpha, lr=0.02)
    optimizer.load_state_dict(from_adam(adamw.state_dict(), optimizer.state_dict()))
    for param in model.parameters():
        state, before = optimizer.state[param], adamw.state[param]
        assert state["step"] == 7
        assert torch.equal(state["exp_avg"], before["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"])
        if alpha:
            started = before["exp_avg"] / (1 - 0.8**7)
            assert torch.allclose(state["exp_avg_grad"], started, rtol=1e-12)
        else:
            assert "exp_avg_grad" not in state
    assert optimizer.param_groups[0]["lr"] == 0.02
    train(optimizer, model, batches, 1)


def test_steps_may_be_counted_in_the_group() -> None:
    """As timm and Apex do."""
    param = torch.nn.Parameter(torch.ones(3))
    moments = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    saved: dict[str, Any] = {
        "state": {0: dict(moments)},
        "param_groups": [{"params": [0], "betas": (0.5, 0.9), "step": 2}],
    }
    converted = from_adam(saved, ALTO([param]).state_dict())
    assert converted["state"][0]["step"] == 2
    assert torch.allclose(converted["state"][0]["exp_avg_grad"], torch.ones(3) / 0.75)
    del saved["param_groups"][0]["step"]
    with pytest.raises(ValueError, match="does not say how many steps"):
        from_adam(saved, ALTO([param]).state_dict())


def test_states_of_another_optimizer_or_other_groups_are_refused() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for param in params:
        param.grad = torch.ones(3)
    sgd.step()
    alto = ALTO(params).state_dict()
    with pytest.raises(ValueError, match="no exp_avg and no exp_avg_sq, but momentum_buffer"):
        from_adam(sgd.state_dict(), alto)
    with pytest.raises(ValueError, match="no prev_grad and no exp_grad_diff"):
        from_authors(sgd.state_dict(), alto)
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, and the optimizer of \[1\]"):
        from_adam(sgd.state_dict(), ALTO(params[:1]).state_dict())
