"""The two passes in C++ (``cpu.cpp``), compiled at the first step; what ZeRO-Offload runs on.

As DeepSpeed's own operators, it is compiled by :mod:`torch.utils.cpp_extension` and kept in the
folder ``TORCH_EXTENSIONS_DIR``.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from alto_ds.kernels.types import Batch, StepSizes

# Dtypes of parameters, of s and m, and of v; the values are those of `Types` in cpu.cpp.
_FLOAT, _BF16, _DOUBLE = torch.float32, torch.bfloat16, torch.float64
_TYPES = {
    (_FLOAT, _FLOAT, _FLOAT): 0,
    (_FLOAT, _BF16, _FLOAT): 1,
    (_BF16, _FLOAT, _FLOAT): 2,
    (_BF16, _BF16, _FLOAT): 3,
    (_DOUBLE, _DOUBLE, _DOUBLE): 4,
}

# No -ffast-math: states must come out as the reference's. The last two let the compiler vectorise
# square roots.
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
_FLAGS_OF_CAPABILITY = {
    "AVX2": ["-mavx2"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}


class _Scalars(ctypes.Structure):
    _fields_ = [
        *[(f"_{i}", ctypes.c_double) for i in range(15)],
        ("noise_key", ctypes.c_int64),
    ]


def supports(batch: Batch) -> bool:
    """Whether the batch's dtypes are among those compiled for, and a compiler was found."""
    return batch.dtypes() in _TYPES and _library() is not None


def update_states(batch: Batch, sizes: StepSizes, sums: Tensor) -> None:
    """Pass 1, and pass 2 of layers that are whole, while their states are in the cache."""
    _call("alto_update_states", batch, sizes, sums)


def apply_update(batch: Batch, sizes: StepSizes, step_sizes: Tensor) -> None:
    """Pass 2 of the fragments that are not whole layers."""
    if not batch.fragments.rows[:, -1].all():
        _call("alto_apply_update", batch, sizes, step_sizes)


def _call(function: str, batch: Batch, sizes: StepSizes, of_layers: Tensor) -> None:
    rows = batch.fragments.rows
    columns = (
        batch.params,
        batch.grads,
        batch.exp_avg_grads if sizes.alpha else None,
        batch.exp_avgs,
        batch.exp_avg_sqs,
    )
    count = len(batch.params)
    addresses = torch.tensor(
        [[t.data_ptr() for t in column] if column else [0] * count for column in columns]
    ).T.contiguous()
    getattr(_library(), function)(
        ctypes.c_int64(_TYPES[batch.dtypes()]),
        ctypes.c_void_p(addresses.data_ptr()),
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(len(rows)),
        ctypes.byref(_scalars(sizes)),
        ctypes.c_void_p(of_layers.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )


def _scalars(sizes: StepSizes) -> _Scalars:
    eps1, eps2, eps3 = sizes.eps
    low, high = sizes.trust_clip or (0.0, math.inf)
    return _Scalars(
        *(sizes.alpha * (1 - sizes.beta1), 1 - sizes.beta1, 1 - sizes.beta2),
        *(sizes.beta3, 1 - sizes.beta3, 1 / sizes.correction2, 1 / sizes.correction3),
        *(eps1, sizes.weight_decay),
        *(float(sizes.lr), float(sizes.adapt), eps2, eps3, low, high),
        sizes.noise_key,
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one warning, where there is no compiler."""
    from torch.utils import cpp_extension  # takes longer to import than all of alto_ds

    # The processor is in the name, for nodes of several kinds may share the folder.
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        path = cpp_extension.load(
            name="alto_ds_cpu_" + capability.lower().replace(" ", "_"),
            sources=[str(Path(__file__).with_suffix(".cpp"))],
            extra_cflags=_FLAGS + _FLAGS_OF_CAPABILITY.get(capability, []),
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
        )
        return ctypes.CDLL(path)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"alto_ds could not compile its kernel for CPUs ({reason}) and uses PyTorch's "
            "operations, which take several times as long. Install a C++ compiler and ninja.",
            stacklevel=2,
        )
        return None
