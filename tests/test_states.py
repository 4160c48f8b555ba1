"""States that do not fit their parameters are refused by name; no kernel gets to see them.

By hand, with a kernel that reports every access beyond a tensor::

    LD_PRELOAD="$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \\
        ALTO_TEST_SANITIZE=1 python -m pytest tests/test_states.py \\
        --hypothesis-profile=10000
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alto_ds import ALTO, E, states
from alto_ds.kernels import cpu

SHAPES = [(), (1,), (7,), (4096,), (3, 5), (5, 3), (64, 65)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
SANITIZE = ["-fsanitize=address", "-g"]


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("ALTO_TEST_SANITIZE"):
            patch.setattr(cpu, "_FLAGS", [*cpu._FLAGS, *SANITIZE])
            patch.setattr(cpu, "_LINKER_FLAGS", [*cpu._LINKER_FLAGS, *SANITIZE])
            cpu._library.cache_clear()
        yield


def stepped(shapes: list[tuple[int, ...]], dtype: torch.dtype, **more: Any) -> ALTO:
    """An optimizer that has taken a step, and has gradients for another."""
    torch.manual_seed(1)
    params = [
        (f"layer{i}", nn.Parameter(torch.randn(s, dtype=dtype))) for i, s in enumerate(shapes)
    ]
    optimizer = ALTO(params, **more)
    for _, param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


def load(optimizer: Any, saved: dict[str, Any], directly: bool) -> None:
    """By load_state_dict, or by putting states in place of the optimizer's, as DeepSpeed does."""
    if not directly:
        optimizer.load_state_dict(saved)
        return
    for place, param in enumerate(optimizer.param_groups[0]["params"]):
        optimizer.state[param].update(saved["state"][place])


def tensors(shapes: st.SearchStrategy[Any]) -> Any:
    return st.builds(
        lambda shape, dtype: torch.ones(shape).to(dtype), shapes, st.sampled_from(DTYPES)
    )


@st.composite
def damages(draw: Any) -> dict[str, Any]:
    """A model, and what is wrong with the states that it is given."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    values = tensors(st.sampled_from(SHAPES)) | st.sampled_from([None, 3, "text"])
    keys = st.sampled_from([states.STEP, *states.ALTO_STATES])
    wrong = st.tuples(st.integers(0, len(shapes) - 1), keys, values)
    return {
        "shapes": shapes,
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "settings": {
            "state_dtype": draw(st.sampled_from(["fp32", "bf16"])),
            "alpha": draw(st.sampled_from([-5.0, 0.0])),
        },
        "saved_settings": {
            "state_dtype": draw(st.sampled_from(["fp32", "bf16"])),
            "alpha": draw(st.sampled_from([-5.0, 0.0])),
        },
        "order": draw(st.permutations(range(len(shapes)))),
        "wrong": draw(st.lists(wrong, max_size=2)),
        "dropped": draw(st.lists(st.tuples(st.integers(0, len(shapes) - 1), keys), max_size=1)),
        "directly": draw(st.booleans()),
    }


# As many examples as the profile says: 100 by default.
@settings(deadline=None)
@given(damage=damages())
def test_wrong_states_are_refused_by_name_or_the_step_is_right(damage: dict[str, Any]) -> None:
    order = damage["order"]
    other = [damage["shapes"][i] for i in order]
    saved = copy.deepcopy(stepped(other, damage["dtype"], **damage["saved_settings"]).state_dict())
    for place, key, value in damage["wrong"]:
        saved["state"][place][key] = value
    for place, key in damage["dropped"]:
        saved["state"][place].pop(key, None)
    optimizer = stepped(damage["shapes"], damage["dtype"], **damage["settings"])
    params = optimizer.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    message = ""
    try:
        load(optimizer, saved, damage["directly"])
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    if message:
        assert any(f"layer{i}" in message for i in range(len(params))), message
        assert any(key in message for key in (states.STEP, *states.ALTO_STATES)), message
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        return
    # What was taken fits, and is what the reference would have taken.
    group = optimizer.param_groups[0]
    for param in params:
        state = optimizer.state[param]
        for key in states.names(group["alpha"]):
            assert state[key].shape == param.shape
            assert state[key].dtype == states.dtype_of(key, param.dtype, group["state_dtype"])
    assert any(not torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("key", states.ALTO_STATES)
@pytest.mark.parametrize("directly", [False, True])
def test_a_truncated_state_is_refused_where_it_is_loaded_or_used(key: str, directly: bool) -> None:
    optimizer = stepped([(8,), (5000,)], torch.float32)
    weights = optimizer.param_groups[0]["params"][1]
    before = weights.detach().clone()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][key] = saved["state"][1][key][:17].clone()
    message = rf"state {key} of layer1 has shape \(17,\), and the parameter \(5000,\)"
    with pytest.raises(RuntimeError, match=message):  # noqa: PT012  refused at one of the two
        load(optimizer, saved, directly)
        optimizer.step()
    assert torch.equal(weights, before)


def test_a_parameter_that_has_grown_is_refused() -> None:
    optimizer = stepped([(8,), (16,)], torch.float32)
    (param, _) = optimizer.param_groups[0]["params"]
    param.data = torch.ones(10_000)
    with pytest.raises(RuntimeError, match=r"gradient of layer0 has shape \(8,\)"):
        optimizer.step()
    param.grad = torch.ones(10_000)
    with pytest.raises(RuntimeError, match=r"state exp_avg_grad of layer0 has shape \(8,\)"):
        optimizer.step()
    optimizer.state.pop(param)
    optimizer.step()  # with states of its new size, and a new layout
    assert optimizer.trust_ratios()["layer0"].weight_norm == pytest.approx(100.0)


def test_a_gradient_of_another_dtype_than_its_parameter_takes_another_kernel() -> None:
    """PyTorch may allow it; the C++ kernel would read beyond the gradient's end."""
    param = nn.Parameter(torch.ones(4096))
    optimizer = ALTO([param], weight_decay=0.1)
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this PyTorch has gradients of the parameter's dtype only")
    param.grad_dtype = torch.bfloat16
    param.grad = torch.ones(4096, dtype=torch.bfloat16)
    twin = nn.Parameter(torch.ones(4096))
    twin.grad = torch.ones(4096)
    optimizer.step()
    ALTO([twin], weight_decay=0.1).step()
    assert torch.allclose(param, twin, rtol=1e-6)


@pytest.mark.parametrize("directly", [False, True])
def test_e_refuses_an_average_of_another_shape(directly: bool) -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = E(torch.optim.SGD(params, lr=0.1))
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["e_exp_avg_grad"] = torch.ones(1)  # it would be broadcast
    before = [p.tolist() for p in params]
    message = r"state e_exp_avg_grad of .* has shape \(1,\)"
    with pytest.raises(RuntimeError, match=message):  # noqa: PT012  refused at one of the two
        load(optimizer, saved, directly)
        optimizer.step()
    assert [p.tolist() for p in params] == before


@pytest.mark.parametrize(
    ("dtype", "alpha", "state_dtype", "expected"),
    [
        (torch.float32, -5.0, "fp32", 12),
        (torch.float32, 0.0, "fp32", 8),
        (torch.float32, -5.0, "bf16", 8),
        (torch.bfloat16, -5.0, "fp32", 12),
        (torch.float64, -5.0, "fp32", 24),
    ],
)
def test_bytes_per_element_are_those_of_the_states_that_are_made(
    dtype: torch.dtype, alpha: float, state_dtype: str, expected: int
) -> None:
    made = states.make(torch.ones(10, dtype=dtype), alpha, state_dtype)
    found = sum(v.numel() * v.element_size() for v in made.values() if torch.is_tensor(v))
    assert found / 10 == expected == states.bytes_per_element(dtype, alpha, state_dtype)
