"""What a user may set, the checks of it, and what one step makes of it.

All settings of ALTO are keys of its parameter groups, so that each group may have its own.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from alto_ds.kernels import Hyperparameters

NAMES = (
    *("lr", "betas", "alpha", "eps", "weight_decay", "bias_correction"),
    *("trust_clip", "trust_ratio", "state_dtype", "seed", "nonfinite"),
)
WITHOUT_AUTO = (
    "here write alpha = -5 with beta1 = 0.99 for global batches of 1,000 samples and more, 0.5 "
    "with 0.01 for smaller ones."
)


def by_batch_size(batch_size: int) -> tuple[float, tuple[float, float, float]]:
    """α and betas for a global batch of so many samples: the paper's two settings."""
    return (0.5, (0.01, 0.9, 0.99)) if batch_size < 1000 else (-5.0, (0.99, 0.9, 0.99))


def check(group: Mapping[str, Any], *, wait_for_device: bool = True) -> None:
    """See that the settings of a parameter group are complete and within their bounds.

    Args:
        group: a parameter group with all of :data:`NAMES`.
        wait_for_device: False leaves a learning rate that is a tensor on an accelerator unread.

    Raises:
        ValueError: names the first setting that is wrong, its value and what to write instead.
    """
    betas, eps, clip = group["betas"], group["eps"], group["trust_clip"]
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 3:
        raise ValueError(
            f"betas={betas!r} must be three numbers (beta1, beta2, beta3): the decay of the "
            "gradient's average, of the first and of the second moment, such as (0.99, 0.9, 0.99). "
            "Leave betas out for these. Where a schedule has set them, as OneCycle does, write "
            '"cycle_momentum": false.' + _hint_at_auto(betas)
        )
    for name, values in (
        *((name, [group[name]]) for name in ("lr", "alpha", "weight_decay")),
        ("betas", betas),
        ("eps", eps if isinstance(eps, Sequence) else [eps]),
        ("trust_clip", clip if isinstance(clip, Sequence) else [] if clip is None else [clip]),
    ):
        if not all(_is_number(value) for value in values):
            hint = _hint_at_auto(group[name]) if name == "alpha" else ""
            raise ValueError(f"{name}={group[name]!r} must be made of numbers.{hint}")
        readable = [value for value in values if wait_for_device or _is_on_host(value)]
        if not all(math.isfinite(value) for value in readable):
            raise ValueError(f"{name}={group[name]!r} must be finite, neither infinite nor NaN.")
    for name in ("lr", "weight_decay"):
        value = group[name]
        if (wait_for_device or _is_on_host(value)) and not value >= 0:
            raise ValueError(f"{name}={value!r} is out of bounds; use a number {name} >= 0.")
    for i, beta in enumerate(betas):
        check_alpha(group["alpha"] if i == 0 else 0.0, beta, f"betas[{i}]")
    if isinstance(eps, Sequence) and len(eps) != 3:
        raise ValueError(
            f"eps={eps!r} must be three numbers (eps1, eps2, eps3), such as (1e-6, 1e-6, 1e-10), "
            "or one number for eps1 with eps2 = eps3 = 0."
        )
    if not all(value >= 0 for value in three_eps(eps)):
        raise ValueError(f"eps={eps} is out of bounds; use values eps >= 0.")
    is_pair = isinstance(clip, Sequence) and len(clip) == 2 and 0 <= clip[0] <= clip[1]
    if clip is not None and not is_pair:
        raise ValueError(
            f"trust_clip={clip!r} must be (low, high) with 0 <= low <= high, such as (0.01, 10), "
            "or None."
        )
    if group["state_dtype"] not in ("fp32", "bf16"):
        raise ValueError(
            f'state_dtype={group["state_dtype"]!r} must be "fp32", or "bf16" for less memory.'
        )
    if not isinstance(group["seed"], int) or isinstance(group["seed"], bool):
        raise ValueError(f"seed={group['seed']!r} must be a whole number.")
    check_nonfinite(group["nonfinite"])
    if not isinstance(group["bias_correction"], bool):
        raise ValueError(f"bias_correction={group['bias_correction']!r} must be true or false.")
    if not isinstance(group["trust_ratio"], bool | None):
        raise ValueError(
            f"trust_ratio={group['trust_ratio']!r} must be true, false, or absent to scale the "
            "group's updates where weight_decay is not 0."
        )


def check_alpha(alpha: float, beta: float, beta_name: str) -> None:
    """Raise ValueError unless 0 <= beta < 1 and |alpha| < 1 / (1 − beta)."""
    for name, value in (("alpha", alpha), (beta_name, beta)):
        if not _is_number(value):
            raise ValueError(f"{name}={value!r} must be a number.{_hint_at_auto(value)}")
    if not 0 <= beta < 1:
        raise ValueError(f"{beta_name}={beta} is out of bounds; use 0 <= {beta_name} < 1.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha} must be finite, neither infinite nor NaN.")
    if not abs(alpha) * (1 - beta) < 1:
        raise ValueError(
            f"alpha={alpha} is out of bounds: with {beta_name}={beta}, |alpha| must be below "
            f"1 / (1 - {beta_name}) = {1 / (1 - beta):g}; use a smaller |alpha|, or {beta_name} "
            f"above {1 - 1 / abs(alpha):g}."
        )


def check_nonfinite(value: str) -> None:
    """Raise ValueError unless ``value`` is "raise", "skip" or "ignore"."""
    if value not in ("raise", "skip", "ignore"):
        raise ValueError(f'nonfinite={value!r} must be "raise", "skip" or "ignore".')


def check_keys(group: Mapping[str, Any]) -> None:
    """Refuse keys of a parameter group that look like misspelt settings.

    Other keys are left alone, for schedulers and frameworks keep values of their own in groups,
    such as ``initial_lr`` or ``base_weight_decay``.

    Raises:
        ValueError: names the key and the setting that it resembles.
    """
    known = ("params", "param_names", *NAMES)
    for key in group.keys() - set(known):
        spelling = key.lower().replace("-", "_")
        for near in difflib.get_close_matches(spelling, known, n=1, cutoff=0.79):
            if not spelling.startswith(f"{near}_") and not spelling.endswith(f"_{near}"):
                raise ValueError(
                    f"the parameter group's key {key!r} is no setting of ALTO; did you mean "
                    f"{near!r}?"
                )


def nothing_decays(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether no group has weight decay, and none says whether its updates are scaled.

    To leave undecayed groups unscaled, as the authors' code does, makes sense only beside decayed
    ones: biases and norms beside matrices. Where nothing decays it would leave no layer scaled.
    """
    return all(group["weight_decay"] == 0 and group["trust_ratio"] is None for group in groups)


def hyperparameters(group: Mapping[str, Any], step: int) -> Hyperparameters:
    """The scalars by which a group's tensors take their step number ``step``, counted from 1.

    The group's ``trust_ratio`` must have been decided.
    """
    beta1, beta2, beta3 = map(float, group["betas"])
    correct, clip = group["bias_correction"], group["trust_clip"]
    return Hyperparameters(
        step=step,
        alpha=float(group["alpha"]),
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        bias_correction2=1 - beta2**step if correct else 1.0,
        bias_correction3=1 - beta3**step if correct else 1.0,
        eps=three_eps(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        lr=group["lr"],
        scaled=group["trust_ratio"],
        trust_clip=None if clip is None else (float(clip[0]), float(clip[1])),
        rounding_key=_rounding_key(group["seed"], step),
        guard=group["nonfinite"] != "ignore",
    )


def three_eps(eps: float | Sequence[float]) -> tuple[float, float, float]:
    """(ε1, ε2, ε3); one number is ε1, with the others 0."""
    eps1, eps2, eps3 = eps if isinstance(eps, Sequence) else (eps, 0.0, 0.0)
    return float(eps1), float(eps2), float(eps3)


def _hint_at_auto(value: Any) -> str:
    if not isinstance(value, str) or value != "auto":
        return ""
    return f' "auto" is for DeepSpeed\'s JSON, where the global batch is known; {WITHOUT_AUTO}'


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_on_host(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _rounding_key(seed: int, step: int) -> int:
    """32 random bits for each step, by the mixing function of SplitMix64."""
    bits = 2**64 - 1
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) & bits
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & bits
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & bits
    return x >> 32
