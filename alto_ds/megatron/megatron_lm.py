"""Megatron-LM's own scripts, such as ``pretrain_gpt.py``, with ALTO in place of their optimizer.

.. code-block:: bash

    torchrun ... -m alto_ds.run --megatron pretrain_gpt.py --alto-alpha -5 OPTIONS OF MEGATRON-LM

Megatron-LM has a fixed list of optimizers and asks its own ``get_megatron_optimizer`` for one.
:func:`use_alto` replaces that name in the process that runs the script, for ``alto_ds.run`` only;
importing alto_ds replaces nothing.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from alto_ds.megatron.optimizer import check_settings, get_megatron_optimizer
from alto_ds.registration import say_on_rank_0

PREFIX = "--alto-"
# These are Megatron-LM's own options, and its scheduler writes them into the groups.
OF_MEGATRON = {"lr": "--lr", "weight_decay": "--weight-decay"}


def use_alto(argv: Sequence[str]) -> list[str]:
    """Let Megatron-LM's ``pretrain()`` in this process train with ALTO or E.

    Call it on every rank where the script's folder is the first of ``sys.path``, before the script
    runs. Rank 0 prints what is replaced, and by which settings.

    Args:
        argv: the command line, settings of ALTO among it: those that
            :func:`alto_ds.megatron.get_megatron_optimizer` takes, as ``--alto-NAME VALUE``.

    Returns:
        The command line without them, for Megatron-LM.

    Raises:
        ValueError: a setting is unknown or out of its bounds, or this is no Megatron-LM.
    """
    settings, rest = take_settings(argv)
    given = {name: value for name, value in settings.items() if name != "type"}
    check_settings(settings.get("type", "ALTO"), given)
    training: Any = _training()
    training.get_megatron_optimizer = functools.partial(get_megatron_optimizer, **settings)
    if hasattr(training, "get_megatron_muon_optimizer"):
        training.get_megatron_muon_optimizer = _refuse_muon
    say_on_rank_0(_told(training.__name__, settings))
    return rest


def take_settings(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into ALTO's settings and the rest, which keeps its order.

    ``--alto-betas 0.99 0.9 0.99 --alto-alpha=-5`` is ``{"betas": [0.99, 0.9, 0.99], "alpha": -5}``.

    Raises:
        ValueError: an option has no value, is there twice, or is Megatron-LM's.
    """
    settings: dict[str, Any] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith((PREFIX, "--alto_")):
            rest.append(word)
            continue
        option, equals, value = word.partition("=")
        name = option[len(PREFIX) :].replace("-", "_")
        # Numbers may begin with one dash, options of Megatron-LM begin with two.
        values = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
        del words[: len(values)]
        read = [_value_of(value) for value in ([value] if equals else []) + values]
        if name in OF_MEGATRON:
            raise ValueError(f"{option} is Megatron-LM's to set; write {OF_MEGATRON[name]}")
        if name in settings:
            raise ValueError(f"{option} is given twice; give it once")
        if not read:
            raise ValueError(f"{option} has no value; write {option} VALUE")
        settings[name] = read[0] if len(read) == 1 else read
    return settings, rest


def _value_of(word: str) -> Any:
    """A number, true, false or null as in JSON; any other word is itself."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def _training() -> ModuleType:
    """Megatron-LM's module that makes the optimizer."""
    name = "megatron.training.training"
    try:
        found = importlib.import_module(name)
    except ValueError as error:  # no refusal of ours
        raise RuntimeError(f"{name} cannot be imported") from error
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # a package that Megatron-LM needs
        raise ValueError(
            f"--megatron: there is no {error.name} beside the script; name a script in a clone of "
            "Megatron-LM, such as Megatron-LM/pretrain_gpt.py"
        ) from None
    if not hasattr(found, "get_megatron_optimizer"):
        raise ValueError(
            f"--megatron: {found.__file__} has no get_megatron_optimizer to replace; use "
            "Megatron-LM from core_v0.16.0 on"
        )
    return found


def _told(module: str, settings: Mapping[str, Any]) -> str:
    given = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "type")
    start = f"alto_ds.run: {module}.get_megatron_optimizer is replaced, and "
    if settings.get("type") == "E":
        return f"{start}E({given}) corrects the gradients of Megatron-LM's own"
    return (
        f"{start}ALTO({given}) steps in place of Megatron-LM's own. --lr, --weight-decay and "
        "their schedules go on; --adam-beta1, --adam-beta2 and --adam-eps are not used"
    )


def _refuse_muon(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "--megatron: --optimizer muon leaves no place for ALTO; write --optimizer adam"
    )
