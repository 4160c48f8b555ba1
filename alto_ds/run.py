"""Run a script that knows nothing of alto_ds, with its optimizers in DeepSpeed's JSON.

.. code-block:: bash

    deepspeed --module alto_ds.run train.py --deepspeed_config config.json

runs ``train.py`` as ``deepspeed train.py --deepspeed_config config.json`` would, with "ALTO" and
"E" registered first, and in place of an optimizer that the script passes to DeepSpeed itself: see
:mod:`alto_ds.client_optimizer`. ``-m package.module`` in place of the script runs a module.
DeepSpeed is imported before the script is.

``--megatron`` before the script's name is for Megatron-LM: see
:mod:`alto_ds.megatron.megatron_lm`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from typing import NoReturn

from alto_ds import client_optimizer
from alto_ds.megatron import megatron_lm


def main() -> None:
    """Run the script or module that the command line names, with the arguments after it."""
    arguments = sys.argv[1:]
    # The deepspeed launcher puts --local_rank=N first; the script expects it among its own.
    launcher = []
    while arguments and arguments[0].startswith("--local_rank"):
        launcher.append(arguments.pop(0))
    prepare = _replace_client_optimizers
    if arguments[:1] == ["--megatron"]:
        arguments.pop(0)
        prepare = _use_alto_in_megatron_lm
    as_module = arguments[:1] == ["-m"]
    if as_module:
        arguments.pop(0)
    if not arguments:
        _refuse(
            "no script named. Usage: deepspeed --module alto_ds.run SCRIPT.py ..., or -m MODULE in "
            "place of the script, or torchrun -m alto_ds.run --megatron SCRIPT.py ..."
        )
    target, sys.argv = arguments[0], [arguments[0], *launcher, *arguments[1:]]
    if as_module:
        if not _is_module(target):
            _refuse(f"there is no module {target!r}; is its package installed?")
        prepare()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(target):
        _refuse(f"there is no script {target!r} in {os.getcwd()}.")
    sys.path[0] = os.path.dirname(os.path.abspath(target))
    prepare()
    runpy.run_path(target, run_name="__main__")


def _replace_client_optimizers() -> None:
    # Before the script runs, so that "from deepspeed import initialize" finds it, too.
    if _is_module("deepspeed"):
        client_optimizer.replace_in(importlib.import_module("deepspeed"))


def _use_alto_in_megatron_lm() -> None:
    try:
        sys.argv = megatron_lm.use_alto(sys.argv)
    except ValueError as error:
        _refuse(str(error))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # its package is missing, or the name is no name
        return False


def _refuse(reason: str) -> NoReturn:
    print(f"alto_ds.run: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
