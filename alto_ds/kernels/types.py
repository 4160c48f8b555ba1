"""What a kernel is given: tensors, the fragments in them, and the scalars of one step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alto_ds.layout import Layout


class StepSizes(NamedTuple):
    """The scalars of one step, the same for all elements of a batch.

    Attributes:
        alpha: α, weight of the exploration average; 0 is LAMB.
        beta1: β1, decay of ``exp_avg_grad``.
        beta2: β2, decay of ``exp_avg``.
        beta3: β3, decay of ``exp_avg_sq``.
        correction2: ``1 − β2^k`` with k the number of this step, counted from 1; 1 without
            bias correction.
        correction3: ``1 − β3^k``, likewise.
        eps: (ε1, ε2, ε3); ε1 is added to the square root, the others are the trust ratio's.
        weight_decay: λ.
        lr: η.
        adapt: whether the update is scaled by the trust ratio.
        trust_clip: lowest and highest trust ratio, or None.
        noise_key: 32 bits that choose the random numbers by which bf16 states are rounded.
    """

    alpha: float
    beta1: float
    beta2: float
    beta3: float
    correction2: float
    correction3: float
    eps: tuple[float, float, float]
    weight_decay: float
    lr: float | Tensor
    adapt: bool
    trust_clip: tuple[float, float] | None
    noise_key: int


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
        """Those of parameters and gradients, of s and m, and of v."""
        return self.params[0].dtype, self.exp_avgs[0].dtype, self.exp_avg_sqs[0].dtype


class FragmentTable:
    """The fragments of a batch's tensors as numbers; made once, used in every step.

    Attributes:
        rows: ``[fragments, 6]``, int64 on the CPU, the columns named by ``COLUMNS``: index of the
            tensor in the batch, first element in the tensor, number of elements, first element in
            the layer, the layer's row in the sums, and 1 where the fragment is a whole layer.
        on_device: the same as a kernel wants it on the device; made by the kernel.
        addresses: where the tensors were at the latest step, and that table on the device.
    """

    COLUMNS = ("tensor", "offset", "length", "start", "layer", "whole")

    def __init__(self, layouts: Iterable[Layout]) -> None:
        rows = []
        first_layer = 0
        for tensor, layout in enumerate(layouts):
            for f in layout.fragments:
                layer = first_layer + f.layer
                rows.append((tensor, f.offset, f.length, f.start, layer, int(f.whole)))
            first_layer += len(layout.layers)
        self.rows = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(self.COLUMNS))
        self.on_device: dict[str, Tensor] = {}
        self.addresses: tuple[list[list[int]], Tensor] | None = None


class Kernel(Protocol):
    """The two passes. Kernels know nothing of distribution."""

    def update_states(self, batch: Batch, sizes: StepSizes, sums: Tensor) -> None:
        """Pass 1: advance the states, and add Σθ² and Σr² of each fragment to its layer.

        A kernel may update at once the weights of fragments that are whole layers.

        Args:
            batch: what to work on.
            sizes: the scalars of this step.
            sums: ``[layers, 2]``, changed in place; float64, or float32 on devices without it.
        """

    def apply_update(self, batch: Batch, sizes: StepSizes, step_sizes: Tensor) -> None:
        """Pass 2: ``θ ← θ − step_size · r``, with r computed again from θ and the states.

        Args:
            batch: as in pass 1.
            sizes: as in pass 1.
            step_sizes: ``[layers]``, of the dtype of the sums: learning rate times trust ratio.
        """
