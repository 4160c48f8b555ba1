"""Bad arguments of the optimizers and of what runs scripts: an error that says what is wrong."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alto_ds import ALTO, E, from_config


def params(**settings: Any) -> Any:
    return [{"params": [nn.Parameter(torch.ones(3, 2))], **settings}]


def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW(params())


NAN, INF = math.nan, math.inf
NUMBERS = "must be made of numbers"
WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(({"lr": lr}, NUMBERS) for lr in (None, "0.1", True, 1j, [0.1], np.array([0.1]))),
    ({"lr": torch.tensor([1.0, 2.0])}, NUMBERS),
    ({"lr": torch.empty(0)}, NUMBERS),
    ({"lr": torch.tensor(NAN)}, "must be finite"),
    ({"lr": torch.tensor(-1.0)}, "is out of bounds; use a number lr >= 0"),
    *(({"lr": lr}, "must be finite, neither infinite nor NaN") for lr in (NAN, INF, -INF)),
    ({"betas": None}, "betas=None must be three numbers"),
    ({"betas": {0.9, 0.8, 0.7}}, "must be three numbers"),
    ({"betas": {"a": 1, "b": 2, "c": 3}}, "must be three numbers"),
    ({"betas": torch.tensor([0.9, 0.9, 0.9])}, "must be three numbers"),
    ({"betas": np.array([0.9, 0.9, 0.9])}, "must be three numbers"),
    ({"betas": b"abc"}, "betas[0]=97 is out of bounds"),
    ({"betas": (0.9, 0.9, "x")}, NUMBERS),
    ({"betas": (0.9, 0.9, None)}, NUMBERS),
    ({"betas": ((0.9,), 0.9, 0.9)}, NUMBERS),
    ({"betas": (0.9, 0.9, True)}, NUMBERS),
    ({"betas": (1 - 1e-17, 0.9, 0.9)}, "betas[0]=1.0 is out of bounds"),
    *(({"alpha": alpha}, NUMBERS) for alpha in (None, True, "x", [1])),
    ({"alpha": INF}, "alpha=inf must be finite"),
    *(({"eps": eps}, NUMBERS) for eps in (None, "1", {"eps1": 1}, True)),
    ({"eps": []}, "eps=[] must be three numbers"),
    ({"eps": (1, 2)}, "must be three numbers (eps1, eps2, eps3)"),
    ({"eps": (1, 2, -1)}, "is out of bounds; use values eps >= 0"),
    ({"eps": (1, 2, NAN)}, "must be finite"),
    *(({"weight_decay": decay}, NUMBERS) for decay in (None, "auto", False)),
    ({"weight_decay": INF}, "must be finite"),
    *(({"bias_correction": value}, "must be true or false") for value in (None, 0, "yes")),
    *(({"trust_clip": clip}, "must be (low, high)") for clip in (0, (), (1,), (2, 1), (-1, 1))),
    *(({"trust_clip": clip}, NUMBERS) for clip in ("01", {"low": 0}, torch.tensor([0.0, 1.0]))),
    *(({"trust_clip": clip}, "must be finite") for clip in ((NAN, 1), (0, INF))),
    *(({"state_dtype": kind}, 'must be "fp32"') for kind in (torch.bfloat16, None, ["bf16"])),
    *(({"seed": seed}, "must be a whole number") for seed in (None, True, 1.0, "1")),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_SETTINGS, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("where", ["argument", "group"])
def test_a_wrong_setting_is_refused_by_its_name(
    where: str, wrong: dict[str, Any], message: str
) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ALTO(params(), **wrong) if where == "argument" else ALTO(params(**wrong))
    assert str(error.value).startswith(name)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        "weights",
        torch.ones(2),
        nn.Linear(2, 2),
        [1],
        [nn.Parameter(torch.ones(2)) * 2],
        [{"params": "weights"}],
        [("named", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))],
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_parameters_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ALTO(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: E(None), "optimizer=None must be a torch.optim.Optimizer that has been made"),  # type: ignore[arg-type]
        (lambda: E("AdamW"), "optimizer='AdamW' must be a torch.optim.Optimizer"),  # type: ignore[arg-type]
        (lambda: E(torch.optim.AdamW), "that has been made, such as E("),  # type: ignore[arg-type]
        (lambda: E(nn.Linear(1, 1)), "must be a torch.optim.Optimizer"),  # type: ignore[arg-type]
        (lambda: E(E(adamw())), "the base optimizer is an E already"),
        (lambda: E(adamw(), alpha="x"), "alpha='x' must be a number"),  # type: ignore[arg-type]
        (lambda: E(adamw(), alpha=True), "alpha=True must be a number"),
        (lambda: E(adamw(), alpha=NAN), "alpha=nan must be finite"),
        (lambda: E(adamw(), beta=1), "beta=1 is out of bounds; use 0 <= beta < 1"),
        (lambda: E(adamw(), beta=NAN), "beta=nan is out of bounds"),
        (lambda: E(adamw(), beta=None), "beta=None must be a number"),  # type: ignore[arg-type]
        (lambda: E(adamw(), beta=(0.9, 0.9)), "beta=(0.9, 0.9) must be a number"),  # type: ignore[arg-type]
        (lambda: from_config(params(), "Adamm"), "'Adamm' names no optimizer in torch.optim"),
        (lambda: from_config(params(), "Optimizer.x"), "names no optimizer in torch.optim"),
        (lambda: from_config(params(), None), "names no optimizer"),  # type: ignore[arg-type]
        (lambda: from_config(params(), "lr_scheduler"), "names no optimizer"),
    ],
    ids=str,
)
def test_wrong_arguments_of_e_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner, inner),
    max_leaves=4,
)
NAMES = ("lr", "betas", "alpha", "eps", "weight_decay", "bias_correction", "trust_clip", "seed")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "state_dtype", "trust_ratio"]), VALUES))
def test_fuzzed_settings_are_taken_or_refused(wrong: dict[str, Any]) -> None:
    group = params(**wrong)
    try:
        optimizer = ALTO(group)
    except ValueError as error:
        assert str(error).startswith((*wrong, "alpha=-5.0 is out", "betas["))  # noqa: PT017
        return
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    with warnings.catch_warnings(action="ignore"):
        optimizer.step()
