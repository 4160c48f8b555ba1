"""The main job, of which rank 1 gets a signal at its third step, before ALTO's all-reduce.

usage: lose_a_rank.py SIGNAL ARGUMENTS..., where ARGUMENTS are the main job's
"""

import os
import signal
import sys
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

import alto_ds
from alto_ds.pretrain.command import main

steps = 0


def lose_rank_1(optimizer: Any, *_: Any) -> None:
    global steps
    steps += isinstance(optimizer, alto_ds.ALTO)
    if steps == 3 and os.environ["RANK"] == "1":
        print("This rank is lost.", flush=True)
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])


register_optimizer_step_pre_hook(lose_rank_1)
main(sys.argv[2:])
