"""From other optimizers' state dicts to ALTO's, so that a run may change its optimizer midway.

.. code-block:: python

    alto = alto_ds.ALTO(model.parameters(), alpha=-5.0, betas=(0.99, 0.9, 0.99))
    alto.load_state_dict(from_adam(adamw.state_dict(), alto.state_dict()))

The parameters must be in the same groups and order in both. States are read elementwise, so this
holds for whole parameters and for the parts of a rank alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from alto_ds.states import EXP_AVG, EXP_AVG_GRAD, EXP_AVG_SQ, STEP

_AUTHORS_SETTINGS = ("lr", "betas", "weight_decay", "eps", "alp")


def from_authors(saved: Mapping[str, Any], alto: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of ALTO from one of the authors' package (``e-optimizer-adaptor``), exactly.

    They keep the exploration average a and the previous gradient g; with ``s ← s + a`` and
    ``a = (1−β1)(g − s)`` follows ``s = g − a β1 / (1−β1)``. Learning rate, betas, α, weight decay
    and ε1 are taken over, with ε2 = ε3 = 0, which is their rule. They clip the gradient's norm to
    1 in ``step()``; here the caller does.

    Args:
        saved: ``state_dict()`` of the authors' ALTO.
        alto: ``state_dict()`` of the ALTO that it is for.

    Raises:
        ValueError: the state dict is another optimizer's, or of other groups.
    """

    def convert(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        beta1 = group["betas"][0]
        average = state["prev_grad"] - state["exp_grad_diff"] * (beta1 / (1 - beta1))
        return _states(state, state[STEP]) | {EXP_AVG_GRAD: average}

    converted = _convert(saved, alto, convert, ("prev_grad", "exp_grad_diff"), _AUTHORS_SETTINGS)
    for group, theirs in zip(converted["param_groups"], saved["param_groups"], strict=True):
        group.update({key: theirs[key] for key in ("lr", "betas", "weight_decay", "eps")})
        group["alpha"] = theirs["alp"]
    return converted


def from_adam(saved: Mapping[str, Any], alto: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of ALTO from one of Adam, AdamW or LAMB, of PyTorch, DeepSpeed, Apex or timm.

    First and second moment and the number of steps are taken over. The average of the gradient, s,
    which those optimizers lack, starts as the bias-corrected first moment, their best estimate of
    it. Settings remain ALTO's: their learning rates are not those of a layer-wise optimizer.

    Args:
        saved: ``state_dict()`` of the other optimizer.
        alto: ``state_dict()`` of the ALTO that it is for.

    Raises:
        ValueError: the state dict has no such moments, or is of other groups.
    """

    def convert(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        step = int(state.get(STEP, group.get(STEP, 0)))  # timm and Apex count in the group
        if step < 1:
            raise ValueError(
                "the state dict does not say how many steps were taken (no step in its states or "
                "groups); ALTO needs that to correct the bias of the moments."
            )
        correction = 1 - float(group["betas"][0]) ** step
        return _states(state, step) | {EXP_AVG_GRAD: state[EXP_AVG] / correction}

    return _convert(saved, alto, convert, (EXP_AVG, EXP_AVG_SQ), ("betas",))


def _states(state: Mapping[str, Any], step: Any) -> dict[str, Any]:
    return {STEP: int(step), EXP_AVG: state[EXP_AVG], EXP_AVG_SQ: state[EXP_AVG_SQ]}


def _check_settings(group: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in group]
    if missing:
        raise ValueError(
            f"a group of the state dict has no {' and no '.join(missing)}: it is of another "
            "optimizer."
        )
    if not 0 <= float(group["betas"][0]) < 1:
        raise ValueError(f"betas={group['betas']!r} in the state dict are out of bounds.")


def _convert(
    saved: Mapping[str, Any],
    alto: Mapping[str, Any],
    convert: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]],
    needed: tuple[str, ...],
    settings: tuple[str, ...],
) -> dict[str, Any]:
    """ALTO's state dict with each of the saved states converted."""
    for name, found in (("saved", saved), ("alto", alto)):
        groups = found.get("param_groups") if isinstance(found, Mapping) else None
        is_list = isinstance(groups, list) and all("params" in group for group in groups)
        if not is_list or not isinstance(found.get("state"), Mapping):
            raise ValueError(f"{name} is no state dict; pass what the optimizer's state_dict() is.")
    theirs, ours = saved["param_groups"], alto["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state dict has groups of {sizes[0]} parameters, and the optimizer of {sizes[1]}; "
            "make ALTO with the parameters in the same groups and order."
        )
    states: dict[Any, dict[str, Any]] = {}
    for group, own in zip(theirs, ours, strict=True):
        for key, own_key in zip(group["params"], own["params"], strict=True):
            state = saved["state"].get(key)
            if not state:
                continue  # a parameter that has had no gradient
            missing = [name for name in needed if not isinstance(state.get(name), Tensor)]
            if missing:
                raise ValueError(
                    f"the states of parameter {key} have no {' and no '.join(missing)}, but "
                    f"{', '.join(map(str, state))}: they are of another optimizer."
                )
            _check_settings(group, settings)
            states[own_key] = convert(state, group)
            for name, value in states[own_key].items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    raise ValueError(
                        f"the state {name} of parameter {key} would not be finite; take an older "
                        "checkpoint, or start without states."
                    )
            if not own["alpha"]:
                del states[own_key][EXP_AVG_GRAD]
    return {"state": states, "param_groups": [dict(group) for group in ours]}
