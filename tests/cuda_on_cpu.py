"""A mock of hardware: megatron-core, which asks for CUDA by name, finds the CPU in its place.

megatron-core makes tensors on ``device="cuda"``, looks for ``torch.cuda.FloatTensor`` in the names
of their types, and keeps the state of CUDA's random numbers. Nothing of what it computes is mocked:
ranks are real processes, and their groups are gloo's. gloo gathers no tensors of different sizes,
so LayerWiseDistributedOptimizer sends weights by its own ``broadcast_params``, which megatron-core
keeps as a reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _CudaIsCpu(TorchFunctionMode):
    """``device="cuda"`` is the CPU, and types are called ``torch.cuda.*``.

    ``cuda()`` and ``pin_memory()`` do nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func is Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """A stream on which there is nothing to wait for."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def _cpu_rng_state(device: Any = "cuda") -> Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Let megatron-core run on this rank's CPU."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.tensor_parallel import random

    mocks = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda *_: None,
        "current_stream": lambda *_: _Stream(),
        "synchronize": lambda *_: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": _cpu_rng_state,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in mocks.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", _cpu_rng_state))
        stack.enter_context(mock.patch.object(random, "_set_cuda_rng_state", _set_cpu_rng_state))
        broadcast = LayerWiseDistributedOptimizer.broadcast_params
        stack.enter_context(
            mock.patch.object(LayerWiseDistributedOptimizer, "allgather_params", broadcast)
        )
        stack.enter_context(mock.patch.object(nn.Module, "cuda", lambda module, *_: module))
        stack.enter_context(_CudaIsCpu())
        yield
