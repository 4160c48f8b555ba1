"""NaN and infinity in one process: what is raised, skipped and kept. Ranks: tests/sharding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alto_ds import ALTO, E
from alto_ds.kernels import cpu

BAD = (math.nan, math.inf, -math.inf)
PLACES = ("gradient", "weight", "exp_avg_grad", "exp_avg", "exp_avg_sq")


def layers(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """The first two are scaled, and the third is not; each has several blocks of any kernel."""
    torch.manual_seed(0)
    sizes = {"bad": (37, 300), "good": (4, 5), "bias": (5000,)}
    return {name: nn.Parameter(torch.randn(size, dtype=dtype)) for name, size in sizes.items()}


def make(params: dict[str, nn.Parameter], **settings: Any) -> ALTO:
    scaled = [(name, p) for name, p in params.items() if name != "bias"]
    bias = {"params": [("bias", params["bias"])], "weight_decay": 0.0}
    return ALTO([{"params": scaled, "weight_decay": 0.1}, bias], **settings)


def set_gradients(params: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def everything(params: dict[str, nn.Parameter], optimizer: ALTO) -> dict[str, Tensor]:
    found = {}
    for name, param in params.items():
        found[name] = param.detach()
        found |= {f"{name}.{key}": v for key, v in optimizer.state[param].items() if key != "step"}
    return {name: tensor.clone() for name, tensor in found.items()}


def spoil(param: nn.Parameter, state: dict[str, Tensor], where: str, value: float) -> None:
    tensor = {"gradient": param.grad, "weight": param.data}.get(where, state.get(where))
    assert tensor is not None
    tensor.view(-1)[2345 % tensor.numel()] = value


@pytest.fixture(params=["cpu", "reference"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(cpu, "supports", lambda batch: False)
    return request.param


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("layer", ["bad", "bias"])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_nothing_that_is_not_finite_is_written(
    kernel: str, layer: str, where: str, value: float, state_dtype: str
) -> None:
    params = layers()
    optimizer = make(params, state_dtype=state_dtype)
    for seed in (1, 2):
        set_gradients(params, seed)
        optimizer.step()
    twin_params, twin = copy.deepcopy((params, optimizer))
    for some in (params, twin_params):
        set_gradients(some, 3)
    spoil(params[layer], optimizer.state[params[layer]], where, value)
    before = everything(params, optimizer)
    names = where if where in ("gradient", "weight") else f"state {where}"
    with pytest.raises(FloatingPointError, match=rf"step 3: {layer} has .* in its {names}.*rank 0"):
        optimizer.step()
    twin.step()
    after, expected = everything(params, optimizer), everything(twin_params, twin)
    for name, tensor in after.items():
        # What is not finite was there before, and no more than that.
        assert torch.equal(tensor.isfinite(), before[name].isfinite())
        if not name.startswith(layer):
            assert torch.equal(tensor, expected[name])
    finite = before[layer].isfinite()
    assert torch.equal(after[layer][finite], before[layer][finite])


def test_a_step_that_is_too_large_for_the_weights_is_left_out(kernel: str) -> None:
    params = layers()
    optimizer = make(params)
    set_gradients(params, 1)
    before = params["bad"].detach().clone()
    optimizer.param_groups[0]["lr"] = 1e38
    with pytest.raises(FloatingPointError, match=r"bad has .* update, .*: lower the learning rate"):
        optimizer.step()
    assert torch.equal(params["bad"], before)
    assert all(tensor.isfinite().all() for tensor in everything(params, optimizer).values())


def test_gradients_whose_squares_are_infinite_are_too_large(kernel: str) -> None:
    """m and v would be 1e24 and infinity, and r = m / ∞ = 0 looks well."""
    params = layers()
    optimizer = make(params)
    set_gradients(params, 1)
    spoil(params["bad"], {}, "gradient", 1e25)
    with pytest.raises(
        FloatingPointError, match=r"bad has .* gradient, NaN, infinite or too large"
    ):
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in everything(params, optimizer).values())


@pytest.mark.parametrize("value", BAD)
def test_skip_changes_nothing_and_the_next_step_is_exact(kernel: str, value: float) -> None:
    params = layers(torch.float64)
    optimizer = make(params, nonfinite="skip")
    set_gradients(params, 1)
    optimizer.step()
    twin_params, twin = copy.deepcopy((params, optimizer))
    before = everything(params, optimizer)
    set_gradients(params, 2)
    spoil(params["bias"], {}, "gradient", value)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(x, before[name]) for name, x in everything(params, optimizer).items())
    for some in (params, twin_params):
        set_gradients(some, 3)
    optimizer.step()
    twin.step()
    assert optimizer.skipped_steps == 1
    expected = everything(twin_params, twin)
    assert all(torch.equal(x, expected[name]) for name, x in everything(params, optimizer).items())


def test_ignore_computes_with_them(kernel: str) -> None:
    params = layers()
    optimizer = make(params, nonfinite="ignore")
    set_gradients(params, 1)
    spoil(params["bad"], {}, "gradient", math.nan)
    optimizer.step()
    assert params["bad"].isnan().all()  # its norm is NaN
    assert all(params[name].isfinite().all() for name in ("good", "bias"))
    assert math.isnan(optimizer.trust_ratios()["bad"].ratio)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("where", ["gradient", "e_exp_avg_grad"])
def test_e_changes_nothing_where_a_number_is_not_finite(where: str, nonfinite: str) -> None:
    params = layers()
    base = torch.optim.AdamW(params.items())
    optimizer = E(base, nonfinite=nonfinite)
    set_gradients(params, 1)
    optimizer.step()
    set_gradients(params, 2)
    spoil(params["bad"], optimizer.state[params["bad"]], where, math.nan)
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    if nonfinite == "raise" or where != "gradient":
        message = "gradient" if where == "gradient" else f"state {where}"
        with pytest.raises(FloatingPointError, match=rf"E: step .*bad .*{message}.*rank 0"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    after = (params, optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_what_was_raised_is_raised_again_before_a_checkpoint_until_a_step_or_a_load() -> None:
    params = layers()
    optimizer = make(params)
    set_gradients(params, 1)
    optimizer.step()
    optimizer.raise_nonfinite()
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(params["bad"], {}, "gradient", math.nan)
    for act in (optimizer.step, optimizer.raise_nonfinite, optimizer.raise_nonfinite):
        with pytest.raises(FloatingPointError, match="step 2: bad has"):
            act()
    optimizer.load_state_dict(saved)
    optimizer.raise_nonfinite()


def test_what_to_do_is_chosen_anew_and_not_loaded() -> None:
    """Otherwise a run could not follow the advice of the message."""
    params = layers()
    saved = make(params).state_dict()
    optimizer = make(params, nonfinite="skip")
    optimizer.load_state_dict(saved)
    assert {group["nonfinite"] for group in optimizer.param_groups} == {"skip"}


def test_finite_gradients_that_are_too_large_for_e_are_named() -> None:
    params = layers()
    optimizer = E(torch.optim.SGD(params.items(), lr=0.1))
    set_gradients(params, 1)
    params["good"].grad = torch.full_like(params["good"], 3e38)
    with pytest.raises(FloatingPointError, match="E: step 1: not finite: good in its gradient"):
        optimizer.step()


def test_a_copy_of_e_goes_on_where_a_parameter_has_had_no_gradient_yet() -> None:
    params = layers()
    optimizer = E(torch.optim.AdamW(params.items()))
    params["bad"].grad = torch.ones_like(params["bad"])
    optimizer.step()
    twin_params, twin = copy.deepcopy((params, optimizer))
    for some, stepped in ((params, optimizer), (twin_params, twin)):
        set_gradients(some, 1)
        stepped.step()
    assert all(torch.equal(params[name], twin_params[name]) for name in params)
