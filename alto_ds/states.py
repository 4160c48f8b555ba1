"""The optimizer's states: names, dtypes, bytes, making, checking and restoring them.

Whoever reads, converts or counts states asks here. All states have the shape of their tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEP = "step"  # number of steps that the tensor has taken
EXP_AVG_GRAD = "exp_avg_grad"  # s, average of the gradient; absent where alpha is 0
EXP_AVG = "exp_avg"  # m, average of the corrected gradient
EXP_AVG_SQ = "exp_avg_sq"  # v, average of its square
# E's only state. Not ALTO's name, for ALTO may be its base optimizer and keeps its own average.
E_EXP_AVG_GRAD = "e_exp_avg_grad"

ALTO_STATES = (EXP_AVG_GRAD, EXP_AVG, EXP_AVG_SQ)

# v is never kept in bf16: its steps are too small for that.
_ALWAYS_FP32 = (EXP_AVG_SQ, E_EXP_AVG_GRAD)


def names(alpha: float) -> tuple[str, ...]:
    """ALTO's states of the size of a parameter; LAMB, with α = 0, needs no s."""
    return (EXP_AVG_GRAD, EXP_AVG, EXP_AVG_SQ) if alpha else (EXP_AVG, EXP_AVG_SQ)


def dtype_of(name: str, param_dtype: torch.dtype, state_dtype: str = "fp32") -> torch.dtype:
    """The dtype of a state: bfloat16 where that is chosen and possible, else at least float32.

    Args:
        name: of the state.
        param_dtype: of the tensor that the optimizer updates.
        state_dtype: "fp32" or "bf16", the group's setting.
    """
    if state_dtype == "bf16" and name not in _ALWAYS_FP32:
        return torch.bfloat16
    return torch.promote_types(param_dtype, torch.float32)


def bytes_per_element(param_dtype: torch.dtype, alpha: float, state_dtype: str = "fp32") -> int:
    """Bytes of all states for one element of a parameter: 12 in float32, 8 with α = 0 or bf16."""
    return sum(dtype_of(name, param_dtype, state_dtype).itemsize for name in names(alpha))


def zeros(name: str, tensor: Tensor, state_dtype: str = "fp32") -> Tensor:
    """A new state of ``tensor``, in its shape and memory format."""
    dtype = dtype_of(name, tensor.dtype, state_dtype)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)


def make(tensor: Tensor, alpha: float, state_dtype: str) -> dict[str, Any]:
    """All states of a tensor that has taken no step."""
    made = {name: zeros(name, tensor, state_dtype) for name in names(alpha)}
    return {STEP: 0, **made}


def check(
    columns: Sequence[Any],
    state: Mapping[str, Any],
    name: Callable[[], str],
    alpha: float,
    state_dtype: str,
) -> None:
    """See that gradient and states fit their tensor; kernels reach them by address.

    Args:
        columns: this rank's parts of the parameter, of its gradient and of its states in the
            order of :func:`names`.
        state: all states of the tensor.
        name: of the tensor, for messages.
        alpha: the group's setting.
        state_dtype: the group's setting.

    Raises:
        RuntimeError: a state is missing, or of another shape, dtype or device; or the gradient is
            of another shape or device.
    """
    param, grad, *values = columns
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"ALTO: the gradient of {name()} has shape {tuple(grad.shape)} on {grad.device}, and "
            f"the parameter {tuple(param.shape)} on {param.device}: the parameter was resized or "
            "moved after backward(). Call zero_grad() and backward() again."
        )
    if not _counts_steps(state.get(STEP)):
        raise RuntimeError(
            f"ALTO: the state {STEP} of {name()} is {_what(state.get(STEP))}, where the number of "
            "steps is needed; load the checkpoint of this model, or start without loaded states."
        )
    for key, value in zip(names(alpha), values, strict=True):
        if value is None and key == EXP_AVG_GRAD:
            raise RuntimeError(
                f"ALTO: alpha={alpha} needs the state {key} of {name()}, and the states that were "
                "loaded lack it: a run with alpha=0 does not keep it, and checkpoints in a format "
                "that knows no states but Adam's drop it. Go on with alpha=0, load an ordinary "
                "checkpoint, or start without loaded states."
            )
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"ALTO: the state {key} of {name()} is {_what(value)}, where a tensor is needed; "
                "load the checkpoint of this model, or start without loaded states."
            )
        if value.shape != param.shape:
            raise shape_error(key, name(), value, param)
        dtype = dtype_of(key, param.dtype, state_dtype)
        if value.dtype != dtype or value.device != param.device:
            raise RuntimeError(
                f"ALTO: the state {key} of {name()} is {value.dtype} on {value.device}, and must "
                f'be {dtype} on {param.device} ("state_dtype": "{state_dtype}"); load it by '
                "load_state_dict(), which converts it."
            )


def check_loaded(
    loaded: Mapping[Any, Mapping[str, Any]], keys: Sequence[str], name_of: Mapping[Tensor, str]
) -> None:
    """See that states that are about to be loaded have the shapes of their tensors.

    Args:
        loaded: by tensor, its states.
        keys: the states to look at.
        name_of: names for messages; wrappers' own tensors have none.

    Raises:
        RuntimeError: names the state and the tensor that differ in shape.
    """
    for tensor, own in loaded.items():
        if isinstance(tensor, Tensor):
            for key in keys:
                if isinstance(own.get(key), Tensor) and own[key].shape != tensor.shape:
                    name = name_of.get(tensor, "a wrapper's tensor")
                    raise shape_error(key, name, own[key], tensor)


def shape_error(key: str, name: str, state: Tensor, param: Tensor) -> RuntimeError:
    """What to raise where the state ``key`` of the tensor ``name`` has not the tensor's shape."""
    return RuntimeError(
        f"alto_ds: the state {key} of {name} has shape {tuple(state.shape)}, and the parameter "
        f"{tuple(param.shape)}: the checkpoint is incomplete, of another model or of one whose "
        "parameters are in another order, or the parameter was resized after its states were "
        "made. Load the checkpoint of this model, or start without loaded states."
    )


def restore_dtypes(
    optimizer: Optimizer, state_dict: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """Load states again where ``Optimizer.load_state_dict`` has cast them to a wrong dtype.

    It casts floating-point states to the parameter's dtype.

    Args:
        optimizer: what ``state_dict`` has been loaded into.
        state_dict: as ``optimizer.state_dict()`` returned it.
        keys: the states to see to; others are left as they are.
    """
    # Where numbers of groups or tensors differ, torch has refused the state dict.
    for saved_group, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for saved_id, tensor in zip(saved_group["params"], group["params"], strict=True):
            saved, own = state_dict["state"].get(saved_id, {}), optimizer.state[tensor]
            for key in saved.keys() & set(keys):
                dtype = dtype_of(key, tensor.dtype, group.get("state_dtype", "fp32"))
                if isinstance(own.get(key), Tensor) and own[key].dtype != dtype:
                    own[key] = saved[key].to(tensor.device, dtype, copy=True)


def _counts_steps(step: Any) -> bool:
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    counts = isinstance(number, int | float) and math.isfinite(number)
    return counts and number >= 0 and number == int(number)


def _what(value: Any) -> str:
    return f"a tensor of {value.numel()} elements" if isinstance(value, Tensor) else repr(value)
