"""How much memory do a model's forward and backward pass take, besides weights and gradients?

The main job's own model runs on tensors without data (PyTorch's ``FakeTensorMode``), and the bytes
of all that are alive are counted. So whatever the model does, such as its loss in parts or
checkpointing, is in the figure, for the largest model within seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from alto_ds.pretrain.model import make_model, model_config
from alto_ds.pretrain.settings import ModelSettings


class Activations(NamedTuple):
    """Bytes of one micro step on one rank.

    Attributes:
        kept: for the gradient, at the end of the forward pass.
        peak: at most, in either pass.
    """

    kept: int
    peak: int


class Vocabulary(Sequence[int]):
    """As much of a tokenizer as a model's configuration asks for."""

    eos_token_id = 0

    def __init__(self, size: int) -> None:
        self._range = range(size)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        return self._range[index]


def meta_model(settings: ModelSettings, vocab_size: int) -> torch.nn.Module:
    """The main job's model on the meta device: shapes and no data."""
    with torch.device("meta"):
        return make_model(
            model_config(settings, Vocabulary(vocab_size)), 0, settings.activation_checkpointing
        )


def measure(
    settings: ModelSettings, vocab_size: int, dtype: torch.dtype, micro_batch_size: int
) -> Activations:
    """Activations of a micro step, without compilation.

    Args:
        settings: of the model.
        vocab_size: tokens of the tokenizer.
        dtype: of the weights that the model computes with.
        micro_batch_size: sequences.
    """
    config = model_config(settings, Vocabulary(vocab_size))
    with FakeTensorMode(), _Alive() as alive, _default_dtype(dtype):
        built = make_model(config, 0, settings.activation_checkpointing)
        tokens = torch.zeros(micro_batch_size, settings.length, dtype=torch.int64)
        # A gradient is dropped where it is complete; ZeRO's own room for it is counted elsewhere.
        for param in built.parameters():
            param.register_post_accumulate_grad_hook(_drop)
        alive.restart()
        loss = built(tokens, tokens)
        kept = alive.bytes
        loss.backward()
        return Activations(kept, alive.peak)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes parameters of a dtype; those of tensors without data cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _drop(param: Tensor) -> None:
    param.grad = None


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
