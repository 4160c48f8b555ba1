"""What a kernel is given: tensors, the fragments in them, and the scalars of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alto_ds.layout import Fragment


class Hyperparameters(NamedTuple):
    """The scalars of one step, the same for all elements of a batch.

    Attributes:
        step: k, its number, counted from 1; for messages.
        alpha: α, weight of the exploration average; 0 is LAMB.
        beta1: β1, decay of ``exp_avg_grad``.
        beta2: β2, decay of ``exp_avg``.
        beta3: β3, decay of ``exp_avg_sq``.
        bias_correction2: ``1 − β2^k``; 1 without bias correction.
        bias_correction3: ``1 − β3^k``, likewise.
        eps: (ε1, ε2, ε3); ε1 is added to the square root, the others are the trust ratio's.
        weight_decay: λ.
        lr: η.
        scaled: whether the update is scaled by the trust ratio.
        trust_clip: lowest and highest trust ratio, or None.
        rounding_key: 32 bits that choose the random numbers of stochastic rounding.
        guard: whether what is not finite is kept out of weights and states.
    """

    step: int
    alpha: float
    beta1: float
    beta2: float
    beta3: float
    bias_correction2: float
    bias_correction3: float
    eps: tuple[float, float, float]
    weight_decay: float
    lr: float | Tensor
    scaled: bool
    trust_clip: tuple[float, float] | None
    rounding_key: int
    guard: bool


def largest_weight(dtype: torch.dtype) -> float:
    """What a weight may become under the guard: float32 may be rounded to bfloat16 later."""
    return torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).max


class Batch(NamedTuple):
    """Tensors of one device and one set of dtypes that take a step together.

    The lists are parallel. Tensors with several fragments are flat; a state has as many elements
    as its parameter, in the same order.

    Attributes:
        params: θ; read in pass 1, changed in place by pass 2.
        grads: g; read only.
        exp_avg_grads: s, changed in place by pass 1; empty where α is 0, which needs no s.
        exp_avgs: m, likewise.
        exp_avg_sqs: v, likewise. Its dtype is that of the arithmetic.
        fragments: the elements to work on; all others are padding.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avg_grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    fragments: FragmentTable

    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Those of parameters, of s and m, and of v."""
        return self.params[0].dtype, self.exp_avgs[0].dtype, self.exp_avg_sqs[0].dtype


class FragmentTable:
    """The fragments of a batch's tensors as numbers; made once, used in every step.

    ``tensor`` counts the tensors of the batch here, and ``layer`` the rows of the sums.

    Attributes:
        rows: ``[fragments, columns]``, int64 on the CPU, with the columns that ``COLUMNS`` names.
        on_device: the same as a kernel wants it on the device; made by the kernel.
        addresses: where the tensors were at the latest step, and that table on the device.
    """

    COLUMNS = Fragment._fields

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        rows = torch.tensor(fragments, dtype=torch.int64)
        self.rows = rows.reshape(len(fragments), len(self.COLUMNS))
        self.on_device: dict[str, Tensor] = {}
        self.addresses: tuple[list[list[int]], Tensor] | None = None

    def column(self, name: str) -> Tensor:
        """``[fragments]``, one of ``COLUMNS``."""
        return self.rows[:, self.COLUMNS.index(name)]

    def fragments(self) -> list[Fragment]:
        """The rows by name."""
        return [Fragment(*row) for row in self.rows.tolist()]


class Kernel(Protocol):
    """The two passes. Kernels know nothing of distribution."""

    def update_states(self, batch: Batch, hyper: Hyperparameters, sums: Tensor) -> None:
        """Pass 1: advance the states, and add Σθ² and Σr² of each fragment to its layer.

        A kernel may update at once the weights of fragments that are whole layers.

        Under the guard a block of elements, of the kernel's own size, whose new states or r would
        not all be finite keeps its states, and the sums of its layer become NaN or infinite.

        Args:
            batch: what to work on.
            hyper: the scalars of this step.
            sums: ``[layers, 2]``, changed in place; float64, or float32 on devices without it.
        """

    def apply_update(self, batch: Batch, hyper: Hyperparameters, step_sizes: Tensor) -> None:
        """Pass 2: ``θ ← θ − step_size · r``, with r computed again from θ and the states.

        A step size of 0 leaves weights alone, also where r is not finite.

        Args:
            batch: as in pass 1.
            hyper: as in pass 1.
            step_sizes: ``[layers]``, of the dtype of the sums: learning rate times trust ratio,
                and under the guard 0 for layers that would not be finite.
        """
