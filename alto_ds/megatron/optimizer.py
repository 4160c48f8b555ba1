"""megatron-core's own optimizer, with ALTO or E inside.

.. code-block:: python

    from alto_ds.megatron import get_megatron_optimizer

    config = OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=1e-4, clip_grad=1.0, ...)
    optimizer = get_megatron_optimizer(config, model_chunks, alpha=-5.0, betas=(0.99, 0.9, 0.99))

megatron-core makes its wrappers around Adam, as it always does; before Adam has a state, ours is
put in its place. Wrappers, gradient clipping, schedulers and the exchange of gradients and weights
remain megatron-core's, and so do its classes.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from alto_ds import registration, settings
from alto_ds.adaptor import E
from alto_ds.layout.megatron import layout_of
from alto_ds.megatron import layer_wise, wrappers
from alto_ds.megatron.checkpoints import carry_all_states
from alto_ds.megatron.refusals import refuse
from alto_ds.optimizer import ALTO

# lr and weight_decay are missing: megatron-core's config and scheduler set them.
_SETTINGS = {
    "ALTO": tuple(name for name in settings.NAMES if name not in ("lr", "weight_decay")),
    "E": ("alpha", "beta", "nonfinite"),
}


def get_megatron_optimizer(
    config: Any, model_chunks: Sequence[nn.Module], *arguments: Any, type: str = "ALTO", **more: Any
) -> Any:
    """Return what megatron-core's function of this name returns, with ALTO or E inside.

    All ranks must call this together. Parameter groups, learning rates and weight decay are
    megatron-core's; its ``OptimizerParamScheduler`` sets them in the groups that ALTO steps with.
    A group is scaled by trust ratios where it decays: not where its ``wd_mult`` is 0, which is the
    default of biases and norms. Where no group decays all are scaled, and a warning says so.

    Args:
        config: megatron-core's ``OptimizerConfig``, with ``optimizer="adam"``. ALTO uses its
            ``lr`` and ``weight_decay``, and leaves Adam's betas and eps alone.
            ``use_layer_wise_distributed_optimizer=True``, which megatron-core has from 0.18 on and
            heeds for Muon and its like only, is heeded here.
        model_chunks: this rank's part of the model, each chunk in megatron-core's
            ``DistributedDataParallel``.
        arguments: further arguments of megatron-core's function, by their place.
        type: "ALTO"; or "E", which corrects the gradients of megatron-core's own Adam.
        more: further arguments of megatron-core's function, by their names; all others are
            settings of :class:`alto_ds.ALTO`, but for ``lr`` and ``weight_decay``, or ``alpha``,
            ``beta`` and ``nonfinite`` of :class:`alto_ds.E`.

    Returns:
        megatron-core's optimizer. ``part.optimizer`` for ``part`` in its ``chained_optimizers`` is
        an :class:`alto_ds.ALTO` or :class:`alto_ds.E`.

    Raises:
        ValueError: a setting is unknown or out of its bounds, or with what megatron-core is told
            to do ALTO would not be exact; on all ranks, before anything is changed.
        RuntimeError: this version of megatron-core is not known.
    """
    from megatron.core.optimizer import get_megatron_optimizer as original

    known = inspect.signature(original)
    theirs = {name: value for name, value in more.items() if name in known.parameters}
    ours = {name: value for name, value in more.items() if name not in theirs}
    check_settings(type, ours)
    refuse(config, model_chunks)
    given = known.bind(config, model_chunks, *arguments, **theirs).arguments
    if layer_wise.is_asked_for(config):
        optimizer = layer_wise.make(original, given)
    else:
        optimizer = original(**given)

    names = wrappers.names_of(model_chunks)
    parts = wrappers.parts_of(optimizer)
    held = [wrappers.read(part) for part in parts]
    if type == "E":
        inner: list[Any] = [E(part.optimizer, elementwise=True, **ours) for part in parts]
    else:
        inner = [_alto(*of_part, config, ours) for of_part in zip(parts, held, strict=True)]
        _decide_what_is_scaled([group for alto in inner for group in alto.param_groups])
    for part, (params, ranges), new in zip(parts, held, inner, strict=True):
        for group, old, in_order in zip(new.param_groups, part.param_groups, params, strict=True):
            group["params"] = old["params"]
            owners = wrappers.owners_of(part, in_order, given.get("pg_collection"))
            layout = layout_of(group["params"], ranges, {p: names[p] for p in in_order}, owners)
            new._own.tell(group, layout)
        part.optimizer = new
    carry_all_states(parts)
    return optimizer


def _alto(part: Any, held: wrappers.Held, config: Any, ours: Mapping[str, Any]) -> ALTO:
    """ALTO on the parameters that any rank has a range of, in the groups of Adam's.

    The tensors that are updated take their place afterwards, as in megatron-core and DeepSpeed:
    some are no leaves, which :class:`torch.optim.Optimizer` would refuse.
    """
    of_adam = part.optimizer.defaults.keys()
    groups = []
    for group, params in zip(part.param_groups, held.params, strict=True):
        kept = {key: value for key, value in group.items() if key not in of_adam}
        weight_decay = config.weight_decay * kept.get("wd_mult", 1.0)
        if kept.get("start_wd") == kept.get("end_wd") == 0:  # the scheduler's other way to say it
            weight_decay = 0.0
        scaled = ours.get("trust_ratio")
        groups.append(
            kept | {"params": params, "weight_decay": weight_decay, "trust_ratio": scaled}
        )
    others = {name: value for name, value in ours.items() if name != "trust_ratio"}
    return ALTO(groups, lr=config.lr, **others)


def _decide_what_is_scaled(groups: Sequence[dict[str, Any]]) -> None:
    """Set ``trust_ratio`` in the groups that do not say it, by ALTO's rule.

    ALTO itself would look at the groups of one rank and one optimizer of the chain at its first
    step: a stage of a pipeline may have none that decays.

    Args:
        groups: those of the whole chain; on all ranks the same but for their parameters.
    """
    if settings.nothing_decays(groups):
        registration.warn_on_rank_0(
            "ALTO: config.weight_decay or the wd_mult of every parameter group is 0, so all layers "
            "are scaled by their trust ratios, biases and norms too. Set weight_decay in "
            "megatron-core's OptimizerConfig, which leaves undecayed groups unscaled, or "
            "trust_ratio=True to say that this is meant."
        )
        for group in groups:
            group["trust_ratio"] = True
    for group in groups:
        if group["trust_ratio"] is None:
            group["trust_ratio"] = group["weight_decay"] != 0


def check_settings(kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse a type of optimizer, or a setting, that there is not or that is out of its bounds.

    Raises:
        ValueError: names it, and what to write instead.
    """
    if kind not in list(_SETTINGS):
        raise ValueError(f'alto_ds.megatron: type={kind!r} must be "ALTO" or "E".')
    for name, value in given.items():
        if name in ("lr", "weight_decay"):
            raise ValueError(
                f"alto_ds.megatron: {name}={value!r} is megatron-core's: set {name} in its "
                "OptimizerConfig, and in its scheduler where there is one."
            )
        if name not in _SETTINGS[kind]:
            near = difflib.get_close_matches(name.lower(), _SETTINGS[kind], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(_SETTINGS[kind])}."
            raise ValueError(f"alto_ds.megatron: {name}={value!r} is no setting of {kind}; {hint}")
        if name == "nonfinite" and value == "skip":
            raise ValueError(
                'alto_ds.megatron: nonfinite="skip" is not supported, for each stage of a pipeline '
                'would decide for itself; write "raise".'
            )
    nothing = torch.zeros(1)
    if kind == "E":
        E(torch.optim.Adam([nothing]), **given)
    else:
        ALTO([{"params": [nothing], **given}])
