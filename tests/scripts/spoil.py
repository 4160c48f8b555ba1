"""The main job, in which rank 1 meets a NaN.

usage: spoil.py weight|state|gradients STEP ARGUMENTS..., where ARGUMENTS are the main job's
``weight``, ``state``: in one number, after the update of that step; ``gradients``: from that step
on.
"""

import os
import sys
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import alto_ds
from alto_ds.pretrain import setup
from alto_ds.pretrain.command import main

what, step = sys.argv[1], int(sys.argv[2])
here = os.environ["RANK"] == "1"
micro_steps = 2  # of a step
counted = 0
first: Tensor | None = None


def spoil_number(optimizer: Any, *_: Any) -> None:
    """After ALTO's update, before DeepSpeed copies master weights to the parameters."""
    global counted, first
    if not isinstance(optimizer, alto_ds.ALTO):
        return
    held = next(param for group in optimizer.param_groups for param in group["params"])
    first = held if first is None else first
    counted += held is first  # ZeRO calls the optimizer once for each group
    if here and held is first and counted == step:
        spoiled = held.data if what == "weight" else optimizer.state[held]["exp_avg"]
        spoiled.view(-1)[7] = float("nan")


def spoil_gradient(gradient: Tensor) -> Tensor | None:
    global counted
    counted += 1
    return gradient * float("nan") if here and counted > micro_steps * (step - 1) else None


def make_spoiled_model(*arguments: Any, **others: Any) -> Any:
    model = make_model(*arguments, **others)
    model.transformer.ln_f.bias.register_hook(spoil_gradient)
    return model


if what != "gradients":
    register_optimizer_step_post_hook(spoil_number)
else:
    make_model = setup.make_model
    setup.make_model = make_spoiled_model
main(sys.argv[3:])
