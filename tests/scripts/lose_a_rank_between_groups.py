"""The main job, of which rank 1 is killed when it is about to join a process group.

usage: lose_a_rank_between_groups.py FUNCTION ARGUMENTS..., where FUNCTION is one that makes a
group, itself or by others, and ARGUMENTS are the main job's
"""

import os
import signal
import sys
import traceback
from typing import Any

import torch.distributed as dist

from alto_ds.pretrain.command import main

new_group = dist.new_group


def join(*arguments: Any, **options: Any) -> Any:
    callers = {frame.name for frame in traceback.extract_stack()}
    if sys.argv[1] in callers and os.environ["RANK"] == "1":
        print("This rank is lost.", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return new_group(*arguments, **options)


dist.new_group = join
main(sys.argv[2:])
