"""Makes ``"type": "ALTO"`` and ``"type": "E"`` work in a DeepSpeed JSON.

DeepSpeed looks an optimizer type that it does not know up in ``torch.optim`` and accepts it under
ZeRO where its class is in a list of its own. Both are open to additions, so nothing is patched,
and DeepSpeed is never imported: it has been by the time it makes an optimizer.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from alto_ds.layout import zero

_ZERO_UTILS = "deepspeed.runtime.zero.utils"
_VERIFIED = ((0, 19, 8), (0, 20))  # the first version of DeepSpeed and the first that is too new


def register(name: str, factory: Callable[..., Optimizer]) -> None:
    """Let DeepSpeed make an optimizer of type ``name`` by ``factory(params, **json_params)``."""
    setattr(torch.optim, name, factory)


def support_in_zero(optimizer: type[Optimizer]) -> None:
    """List ``optimizer`` among those that ZeRO accepts, where DeepSpeed has been imported.

    Called whenever an optimizer is made, so that the order of imports does not matter. Warns, once
    and on rank 0, where DeepSpeed's version is not among those that the tests have seen.
    """
    zero_utils = sys.modules.get(_ZERO_UTILS)
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and optimizer not in supported:
        supported.append(optimizer)
        _check_version(sys.modules["deepspeed"])


def refuse_other_updates(
    name: str, groups: Sequence[dict[str, Any]], params: Iterable[torch.Tensor]
) -> None:
    """Refuse what updates weights without calling the optimizer, on all ranks alike.

    ZenFlow and SuperOffload run an Adam of their own with settings that they read from the groups;
    so this is asked whenever groups are read.

    Args:
        name: the optimizer's.
        groups: its parameter groups as they are now.
        params: the model's own parameters.

    Raises:
        RuntimeError: one of the two is at work.
    """
    trained = next((param for param in params if param.requires_grad), None)
    zero3 = getattr(trained, "_z3_optimizer", None)
    tensors = (tensor for group in groups for tensor in group["params"][:1])
    if getattr(zero3, "zenflow", False) or any(hasattr(t, "overlap_grad") for t in tensors):
        raise zenflow_error(name)
    if type(zero3).__name__ == "SuperOffloadOptimizer_Stage3":
        raise RuntimeError(
            f"{name} cannot be used with SuperOffload, which updates weights by an Adam of its "
            'own: remove "super_offload" from "offload_optimizer".'
        )


def zenflow_error(name: str) -> RuntimeError:
    """What to raise where DeepSpeed's ZenFlow uses the optimizer ``name``."""
    return RuntimeError(
        f"{name} cannot be used with ZenFlow, which updates the most important columns by an Adam "
        'of its own: remove "zenflow" from "zero_optimization".'
    )


def _check_version(deepspeed: Any) -> None:
    version = getattr(deepspeed, "__version__", "0")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    first, too_new = _VERIFIED
    rank_zero = not dist.is_initialized() or dist.get_rank() == 0
    if not first <= numbers < too_new and rank_zero:
        warnings.warn(
            f"alto_ds has been tested with DeepSpeed from {'.'.join(map(str, first))} to before "
            f"{'.'.join(map(str, too_new))}; this is {version}. It looks for the attributes "
            f"{', '.join(zero.ATTRIBUTES)}, and refuses to step where they do not fit; compare "
            "alto_ds.ALTO.trust_ratios() with a run on one rank before you rely on it.",
            stacklevel=2,
        )
