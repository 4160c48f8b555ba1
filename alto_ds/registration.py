"""Makes ``"type": "ALTO"`` and ``"type": "E"`` work in a DeepSpeed JSON.

DeepSpeed looks an optimizer type that it does not know up in ``torch.optim`` and accepts it under
ZeRO where its class is in a list of its own. Both are open to additions, so nothing is patched,
and DeepSpeed is never imported: it has been by the time it makes an optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.optim import Optimizer

_ZERO_UTILS = "deepspeed.runtime.zero.utils"


def register(name: str, factory: Callable[..., Optimizer]) -> None:
    """Let DeepSpeed make an optimizer of type ``name`` by ``factory(params, **json_params)``."""
    setattr(torch.optim, name, factory)


def support_in_zero(optimizer: type[Optimizer]) -> None:
    """List ``optimizer`` among those that ZeRO accepts, where DeepSpeed has been imported.

    Called whenever an optimizer is made, so that the order of imports does not matter.
    """
    zero_utils = sys.modules.get(_ZERO_UTILS)
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and optimizer not in supported:
        supported.append(optimizer)
