"""The optimizer's states: names, dtypes, bytes, making, checking and restoring them.

Whoever reads, converts or counts states asks here. All states have the shape of their tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from alto_ds.layout import local

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
    tensor: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    name: str,
    alpha: float,
    state_dtype: str,
) -> None:
    """See that gradient and states fit their tensor; kernels reach them by address.

    Args:
        tensor: what the optimizer updates; of a DTensor this rank's part is meant.
        grad: this rank's part of the gradient.
        state: the tensor's states.
        name: of the tensor, for the message.
        alpha: the group's setting.
        state_dtype: the group's setting.

    Raises:
        RuntimeError: a state is missing, or of another shape, dtype or device; or the gradient is
            of another shape or device.
    """
    if grad.shape != local(tensor).shape or grad.device != tensor.device:
        raise RuntimeError(
            f"ALTO: the gradient of {name} has shape {tuple(grad.shape)} on {grad.device}, and the "
            f"parameter {tuple(local(tensor).shape)} on {tensor.device}: the parameter was resized "
            "or moved after backward(). Call zero_grad() and backward() again."
        )
    _check_step(state.get(STEP), name)
    for key in names(alpha):
        value = state.get(key)
        if value is None and key == EXP_AVG_GRAD:
            raise RuntimeError(
                f"ALTO: alpha={alpha} needs the state {key} of {name}, and the states that were "
                "loaded lack it: a run with alpha=0 does not keep it, and checkpoints in a format "
                "that knows no states but Adam's drop it. Go on with alpha=0, load an ordinary "
                "checkpoint, or start without loaded states."
            )
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"ALTO: the state {key} of {name} is {_what(value)}, where a tensor is needed; "
                "load the checkpoint of this model, or start without loaded states."
            )
        check_shape(local(value).shape, local(tensor).shape, key, name)
        dtype = dtype_of(key, tensor.dtype, state_dtype)
        if value.dtype != dtype or value.device != tensor.device:
            raise RuntimeError(
                f"ALTO: the state {key} of {name} is {value.dtype} on {value.device}, and must be "
                f'{dtype} on {tensor.device} ("state_dtype": "{state_dtype}"); load it by '
                "load_state_dict(), which converts it."
            )


def check_saved(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    name_of: Mapping[Tensor, str],
) -> None:
    """See that saved states fit the tensors that they are loaded for, before they are.

    Args:
        state_dict: as ``Optimizer.state_dict()`` returned it.
        groups: the parameter groups that it is loaded into.
        keys: the states to look at.
        name_of: names for messages; a tensor without one is called by its place.

    Raises:
        RuntimeError: names the state and the tensor that differ in shape.
    """
    for place, tensor, saved in _pairs(state_dict, groups):
        for key in keys:
            if isinstance(saved.get(key), Tensor):
                check_shape(saved[key].shape, tensor.shape, key, name_of.get(tensor, place))


def check_shape(found: torch.Size, needed: torch.Size, key: str, name: str) -> None:
    """Raise RuntimeError where the state ``key`` of ``name`` has not the needed shape."""
    if found != needed:
        raise RuntimeError(
            f"alto_ds: the state {key} of {name} has shape {tuple(found)}, and the parameter "
            f"{tuple(needed)}: the checkpoint is incomplete, of another model or of one whose "
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
    state_dtype_of = {
        tensor: group.get("state_dtype", "fp32")
        for group in optimizer.param_groups
        for tensor in group["params"]
    }
    for _, tensor, saved in _pairs(state_dict, optimizer.param_groups):
        for key in saved.keys() & set(keys):
            dtype = dtype_of(key, tensor.dtype, state_dtype_of[tensor])
            value = optimizer.state[tensor].get(key)
            if isinstance(value, Tensor) and value.dtype != dtype:
                optimizer.state[tensor][key] = saved[key].to(tensor.device, dtype, copy=True)


def _pairs(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """Place, tensor and saved states of each tensor that has some."""
    # Where numbers of groups or tensors differ, torch refuses the state dict.
    for place, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=False)):
        for i, (key, tensor) in enumerate(zip(saved["params"], group["params"], strict=False)):
            yield f"param_groups.{place}.{i}", tensor, state_dict["state"].get(key, {})


def _check_step(step: Any, name: str) -> None:
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    counts = isinstance(number, int | float) and math.isfinite(number)
    if not (counts and number >= 0 and number == int(number)):
        raise RuntimeError(
            f"ALTO: the state {STEP} of {name} is {_what(step)}, where the number of steps is "
            "needed; load the checkpoint of this model, or start without loaded states."
        )


def _what(value: Any) -> str:
    return f"a tensor of {value.numel()} elements" if isinstance(value, Tensor) else repr(value)
