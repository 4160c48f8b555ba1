"""E in front of other optimizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alto_ds import ALTO, E
from alto_ds.adaptor import from_config


def train(optimizer: Any, param: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (param**4).sum().backward()
        optimizer.step()


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def papers_correction(gradients: list[Tensor], alpha: float, beta: float) -> list[Tensor]:
    """g + α a with the paper's a_k = β a_{k-1} + (1−β)(g_k − g_{k-1})."""
    a = previous = torch.zeros_like(gradients[0])
    corrected = []
    for g in gradients:
        a = beta * a + (1 - beta) * (g - previous)
        previous = g
        corrected.append(g + alpha * a)
    return corrected


def check_base(make: Callable[[list[nn.Parameter]], Optimizer], tolerance: float) -> None:
    """E over the base equals the base, given the paper's gradients, on a matrix."""
    param = nn.Parameter(torch.linspace(-2, 2, 12).reshape(4, 3))
    twin = copy.deepcopy(param)
    adapted, plain = E(make([param]), alpha=-5.0, beta=0.9), make([twin])
    gradients: list[Tensor] = []
    for _ in range(10):
        adapted.zero_grad()
        (param**4).sum().backward()
        assert param.grad is not None
        gradients.append(param.grad.clone())
        adapted.step()
        twin.grad = papers_correction(gradients, -5.0, 0.9)[-1]
        plain.step()
    assert (param - twin).norm() < tolerance * twin.norm()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": 0.01}),
        ("SGD", {"lr": 0.01, "momentum": 0.9}),
        ("Adam", {"lr": 0.01}),
        ("AdamW", {"lr": 0.01}),
        ("Adagrad", {"lr": 0.01}),
        ("RMSprop", {"lr": 0.01}),
        ("NAdam", {"lr": 0.01}),
        ("Muon", {"lr": 0.01}),
        ("Adafactor", {"lr": 0.01}),
    ],
)
def test_base_optimizers_receive_the_papers_gradient(name: str, settings: dict[str, Any]) -> None:
    make = getattr(torch.optim, name)
    # Muon orthogonalises in bf16, where a last bit of fp32 may round the other way.
    check_base(lambda params: make(params, **settings), 1e-2 if name == "Muon" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"), [("adam", "DeepSpeedCPUAdam"), ("lion", "DeepSpeedCPULion")]
)
def test_deepspeeds_optimizers_receive_the_papers_gradient(module: str, name: str) -> None:
    """DeepSpeed compiles each in a minute or two; run with -m slow."""
    ops = pytest.importorskip(f"deepspeed.ops.{module}")
    check_base(lambda params: getattr(ops, name)(params, lr=0.01), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FusedAdam needs a GPU")
def test_fused_adam_receives_the_papers_gradient() -> None:
    ops = pytest.importorskip("deepspeed.ops.adam")
    check_base(lambda params: ops.FusedAdam([params[0].cuda()], lr=0.01), 1e-5)


def test_alto_as_base_keeps_an_average_of_its_own() -> None:
    param, twin = parameter(), parameter()
    adapted = E(ALTO([param], betas=(0.9, 0.9, 0.99)), alpha=-5.0, beta=0.9)
    plain = ALTO([twin], betas=(0.9, 0.9, 0.99))
    gradients: list[Tensor] = []
    for _ in range(10):
        adapted.zero_grad()
        (param**4).sum().backward()
        assert param.grad is not None
        gradients.append(param.grad.clone())
        adapted.step()
        twin.grad = papers_correction(gradients, -5.0, 0.9)[-1]
        plain.step()
    assert torch.allclose(param, twin, rtol=1e-12)


def test_a_base_that_is_not_elementwise_is_refused_on_flat_tensors() -> None:
    """As ZeRO leaves them; see tests/sharding for the real ones."""
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]
    flat = nn.Parameter(torch.ones(6))
    flat.grad = torch.ones(6)
    for make, refused in ((torch.optim.Adafactor, True), (torch.optim.RMSprop, False)):
        for elementwise in (None, True, False):
            optimizer = E(make(params), elementwise=elementwise)
            optimizer.param_groups[0]["params"] = [flat]
            if elementwise is False or (elementwise is None and refused):
                with pytest.raises(RuntimeError, match=f"E: the base optimizer {make.__name__}"):
                    optimizer.step()
            else:
                optimizer.step()


def test_a_base_that_is_not_elementwise_may_have_master_copies() -> None:
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]
    optimizer = E(torch.optim.Adafactor(params))
    optimizer.param_groups[0]["params"] = masters = copy.deepcopy(params)
    masters[0].grad = torch.ones(2, 3)
    optimizer.step()
    assert (masters[0] != 1).all()


def test_hooks_of_state_dicts_are_called() -> None:
    called = []
    optimizer = E(torch.optim.SGD([parameter()], lr=0.1))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["saved", "loaded"]


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_its_state_is_saved_with_the_base_optimizers(how: str) -> None:
    param = parameter()
    optimizer = E(torch.optim.AdamW([param]), alpha=-5.0, beta=0.9)
    train(optimizer, param, 5)
    if how == "state_dict":
        twin = copy.deepcopy(param)
        restored = E(torch.optim.AdamW([twin]), alpha=-5.0, beta=0.9)
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        pair = (optimizer, param)
        restored, twin = (
            pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
        )
    train(optimizer, param, 5)
    train(restored, twin, 5)
    assert param.tolist() == twin.tolist()
    assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq", "e_exp_avg_grad"}


def test_swapped_param_groups_reach_the_base_optimizer() -> None:
    first, second = parameter(), parameter()
    optimizer = E(torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1))
    groups = optimizer.param_groups
    first.grad = second.grad = torch.ones_like(first)
    optimizer.param_groups = groups[1:]
    optimizer.step()
    optimizer.param_groups = groups
    assert first.tolist() == parameter().tolist()
    assert second.tolist() != parameter().tolist()


def test_closures_and_schedulers() -> None:
    param = parameter()
    optimizer = E(torch.optim.SGD([param], lr=0.01), alpha=0.5, beta=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.25
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.005


def test_bad_settings_are_refused() -> None:
    base = torch.optim.SGD([parameter()], lr=0.1)
    with pytest.raises(ValueError, match=r"alpha=-5.* = 2;"):
        E(base, alpha=-5.0, beta=0.5)
    with pytest.raises(ValueError, match=r"beta=1.0 is out of bounds"):
        E(base, alpha=0.0, beta=1.0)
    with pytest.raises(
        ValueError, match=r"alpha='auto' must be a number\. .auto. is for DeepSpeed"
    ):
        E(base, alpha="auto")  # type: ignore[arg-type]
    optimizer = E(base)
    optimizer.alpha = float("nan")
    with pytest.raises(ValueError, match="alpha=nan must be finite"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        E(torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS"):
        E(torch.optim.LBFGS([parameter()]))
    with pytest.raises(TypeError, match="is an E already"):
        E(E(base))
    with pytest.raises(ValueError, match="'Adamw' names no optimizer"):
        from_config([parameter()], optimizer="Adamw")


def test_sparse_gradients_are_refused_by_name() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = E(torch.optim.SGD([("table.weight", table.weight)], lr=0.1))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of table\.weight is sparse"):
        optimizer.step()
