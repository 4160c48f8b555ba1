"""What becomes of ALTO or E in DeepSpeed's config where a script passes its own optimizer?

DeepSpeed trains with the optimizer that ``deepspeed.initialize`` is passed, and does not look at
the one that its config names. ``alto_ds.run`` builds the latter from the former's parameter groups
(:func:`replace_in`). ``import alto_ds`` changes nothing and warns (:func:`warn_where_one_is_used`).

The groups stay the same dicts, for the script's schedule holds on to them and goes on. Their ``lr``
and ``weight_decay`` are the script's, which its schedule may write at any time; so are keys that
the passed optimizer does not know, such as ``wd_mult``. All other settings are the config's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from alto_ds import registration
from alto_ds.adaptor import E
from alto_ds.optimizer import ALTO
from alto_ds.settings import WITHOUT_AUTO

_OURS: dict[str, type[Optimizer]] = {"ALTO": ALTO, "E": E}
_THE_SCRIPTS = ("lr", "weight_decay")
# What torch's OneCycleLR and CyclicLR leave in groups where they write momentum.
_OF_CYCLED_MOMENTUM = ("base_momentum", "max_momentum")


def replace_in(deepspeed: Any) -> None:
    """Let ``deepspeed.initialize`` put ALTO or E in place of an optimizer that it is passed.

    It does so where the config names one of them, on every rank alike, and rank 0 says so. An
    optimizer that is one of them already is left alone.

    Args:
        deepspeed: the module.
    """
    make_engine = deepspeed.initialize
    signature = inspect.signature(make_engine)

    @functools.wraps(make_engine)
    def initialize(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named)
        client, config = given.arguments.get("optimizer"), _config(given.arguments)
        if client is not None and config is not None:
            config = deepspeed.load_ds_config(config)
            if _named_in(config) is not None:
                given.arguments["optimizer"] = _in_place_of(client, config)
        return make_engine(*given.args, **given.kwargs)

    deepspeed.initialize = initialize


def warn_where_one_is_used() -> None:
    """Warn on rank 0 of an engine whose config names ALTO or E and that trains with another.

    That shows at the engine's first step, of which PyTorch tells before any weight has changed:
    until then DeepSpeed asks nothing of what alto_ds has registered.
    """
    seen: WeakSet[Optimizer] = WeakSet()

    def look(optimizer: Optimizer, *_: Any) -> None:
        # Compiled steps are no engine's, and what follows would break their graphs.
        if torch.compiler.is_compiling() or optimizer in seen:
            return
        seen.add(optimizer)
        engine = registration.calling_engine()
        name = None if engine is None else engine._config.optimizer_name
        if name in _OURS and not isinstance(engine.basic_optimizer, _OURS[name]):
            registration.warn_on_rank_0(
                f'alto_ds: the DeepSpeed config names "{name}", but this engine trains with '
                f"{type(engine.basic_optimizer).__name__}, which the script passes to "
                f"deepspeed.initialize. For {name} in its place run the script by deepspeed "
                "--module alto_ds.run SCRIPT.py ..., or pass no optimizer."
            )

    register_optimizer_step_pre_hook(look)


def _config(arguments: Mapping[str, Any]) -> Any:
    """The config among what ``deepspeed.initialize`` is given: a dict, a path, text or None."""
    args = arguments.get("args")
    candidates = (
        *(arguments.get(name) for name in ("config", "config_params")),
        *(getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config")),
    )
    return next((config for config in candidates if config is not None), None)


def _named_in(config: Mapping[str, Any]) -> str | None:
    """ "ALTO" or "E" where the config names it."""
    entry = config.get("optimizer")
    name = entry.get("type") if isinstance(entry, Mapping) else None
    return name if isinstance(name, str) and name in _OURS else None


def _in_place_of(client: Any, config: Mapping[str, Any]) -> Any:
    """What to pass to DeepSpeed instead of ``client``, an optimizer or a function that makes one.

    Raises:
        ValueError: a setting is out of its bounds, or the schedule writes momentum.
        RuntimeError: ``client`` has taken steps.
    """
    if isinstance(client, tuple(_OURS.values())):
        registration.say_on_rank_0(
            f"alto_ds.run: the script passes {type(client).__name__} itself, so the settings of "
            '"optimizer" in the config are not used.'
        )
        return client
    if isinstance(client, Optimizer):
        return _replaced(client, config)
    if callable(client):
        return lambda params: _in_place_of(client(params), config)
    return client  # DeepSpeed says what it thinks of it


def _replaced(client: Optimizer, config: Mapping[str, Any]) -> Optimizer:
    """ALTO or E, of the config's settings and the dicts that are ``client.param_groups``."""
    name, its_name = _named_in(config), type(client).__name__
    assert name is not None
    _refuse_what_would_be_lost(name, client)
    params = dict(config["optimizer"].get("params") or {})
    kept = [key for key in _THE_SCRIPTS if key in client.defaults]
    dropped = {key: value for key, value in client.defaults.items() if key not in kept}
    unused = [f"the config's {key}={params.pop(key)!r}" for key in kept if key in params]
    unused += [f"{its_name}'s {key}={value!r}" for key, value in dropped.items() if value]
    settings = registration.fill_in_auto(name, params, functools.partial(_batch_size, config))
    for group in client.param_groups:
        for key in dropped:
            group.pop(key, None)
    ours: Optimizer = getattr(torch.optim, name)(client.param_groups, **settings)
    _let_schedules_see_steps(client, ours)
    registration.say_on_rank_0(
        f"alto_ds.run: {name}, which the config names, replaces {its_name}, which the script "
        f"passes to deepspeed.initialize. {' and '.join(kept)} stay those of the script's "
        f"parameter groups and schedule; not used: {', '.join(unused) or 'nothing'}."
    )
    return ours


def _refuse_what_would_be_lost(name: str, client: Optimizer) -> None:
    states = sorted({key for state in client.state.values() for key in state})
    if states:
        raise RuntimeError(
            f"alto_ds.run: {type(client).__name__}, which the script passes to "
            f"deepspeed.initialize, has states already ({', '.join(states)}), and {name}, which "
            'the config names, cannot go on from them. Remove "optimizer" from the config, or '
            "pass an optimizer that has none."
        )
    cycled = [key for key in _OF_CYCLED_MOMENTUM if any(key in g for g in client.param_groups)]
    if cycled:
        raise ValueError(
            f"alto_ds.run: the script's schedule writes the momentum of {type(client).__name__} "
            f"(its parameter groups have {', '.join(cycled)}), and {name}, which the config names, "
            "would take that for another setting. Write cycle_momentum=False in the schedule."
        )


def _batch_size(config: Mapping[str, Any]) -> int:
    """The global batch, which is asked for before there is an engine to compute it."""
    size = config.get("train_batch_size")
    if not isinstance(size, int):
        raise ValueError(
            f'"train_batch_size": {size!r} in the config must be a number where the script passes '
            f'its own optimizer and alpha or beta is "auto"; or {WITHOUT_AUTO}'
        )
    return size


def _let_schedules_see_steps(client: Optimizer, ours: Optimizer) -> None:
    """Keep PyTorch's schedules from warning that the optimizer they know has not stepped yet."""

    def note(*_: Any) -> None:
        client._opt_called = True  # type: ignore[attr-defined]

    ours.register_step_post_hook(note)
