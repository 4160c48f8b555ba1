"""The two passes in C++ (``cpu.cpp``), compiled at the first step; what ZeRO-Offload runs on.

As DeepSpeed's own operators, it is compiled by :mod:`torch.utils.cpp_extension` and kept in the
folder ``TORCH_EXTENSIONS_DIR``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from alto_ds.kernels.types import Batch, Hyperparameters, largest_weight

# Dtypes of parameters, of s and m, and of v; the values are those of `Types` in cpu.cpp.
_FLOAT, _BF16, _DOUBLE = torch.float32, torch.bfloat16, torch.float64
_TYPES = {
    (_FLOAT, _FLOAT, _FLOAT): 0,
    (_FLOAT, _BF16, _FLOAT): 1,
    (_BF16, _FLOAT, _FLOAT): 2,
    (_BF16, _BF16, _FLOAT): 3,
    (_DOUBLE, _DOUBLE, _DOUBLE): 4,
}

_SOURCE = Path(__file__).with_suffix(".cpp")

# No -ffast-math: states must come out as the reference's. The last two let the compiler vectorise
# square roots.
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
_LINKER_FLAGS = ["-fopenmp"]
_FLAGS_OF_CAPABILITY = {
    "AVX2": ["-mavx2"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}


class _Scalars(ctypes.Structure):
    """``Scalars`` in cpu.cpp, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_double)
            for name in (
                *("exploration", "rate1", "rate2", "beta3", "rate3", "scale2", "scale3"),
                *("eps1", "weight_decay", "lr", "scaled", "eps2", "eps3", "clip_low", "clip_high"),
                "largest",
            )
        ),
        ("rounding_key", ctypes.c_int64),
    ]


def supports(batch: Batch) -> bool:
    """Whether the batch's dtypes are among those compiled for, and a compiler was found."""
    param, _, _ = batch.dtypes()
    same = all(grad.dtype == param for grad in batch.grads)
    return same and batch.dtypes() in _TYPES and _library() is not None


def update_states(batch: Batch, hyper: Hyperparameters, sums: Tensor) -> None:
    """Pass 1, and pass 2 of layers that are whole, while their states are in the cache."""
    _call("alto_update_states", batch, hyper, sums)


def apply_update(batch: Batch, hyper: Hyperparameters, step_sizes: Tensor) -> None:
    """Pass 2 of the fragments that are not whole layers."""
    if not batch.fragments.column("whole").all():
        _call("alto_apply_update", batch, hyper, step_sizes)


def _call(function: str, batch: Batch, hyper: Hyperparameters, of_layers: Tensor) -> None:
    rows = batch.fragments.rows
    columns = (
        batch.params,
        batch.grads,
        batch.exp_avg_grads if hyper.alpha else None,
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
        ctypes.byref(_scalars(batch, hyper)),
        ctypes.c_void_p(of_layers.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )


def _scalars(batch: Batch, hyper: Hyperparameters) -> _Scalars:
    eps1, eps2, eps3 = hyper.eps
    low, high = hyper.trust_clip or (0.0, math.inf)
    return _Scalars(
        exploration=hyper.alpha * (1 - hyper.beta1),
        rate1=1 - hyper.beta1,
        rate2=1 - hyper.beta2,
        beta3=hyper.beta3,
        rate3=1 - hyper.beta3,
        scale2=1 / hyper.bias_correction2,
        scale3=1 / hyper.bias_correction3,
        eps1=eps1,
        weight_decay=hyper.weight_decay,
        lr=float(hyper.lr),
        scaled=float(hyper.scaled),
        eps2=eps2,
        eps3=eps3,
        clip_low=low,
        clip_high=high,
        largest=largest_weight(batch.params[0].dtype) if hyper.guard else math.inf,
        rounding_key=hyper.rounding_key,
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one warning, where it cannot be compiled."""
    if not _SOURCE.is_file():
        _warn(
            f"has no source of its kernel for CPUs ({_SOURCE} is missing)",
            "Install alto-ds again, from a complete wheel or checkout.",
        )
        return None
    from torch.utils import cpp_extension  # takes longer to import than all of alto_ds

    # All that decides the code is in the name: nodes of several kinds may share the folder, and
    # ninja goes by times, which a package manager may set to before those of an older version.
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _FLAGS + _FLAGS_OF_CAPABILITY.get(capability, [])
    code = hashlib.sha256(" ".join([*flags, _SOURCE.read_text()]).encode()).hexdigest()[:12]
    name = f"alto_ds_cpu_{capability.lower().replace(' ', '_')}_{code}"
    try:
        library = Path(cpp_extension._get_build_directory(name, verbose=False), f"{name}.so")
        if not library.exists():
            _compile(library, flags)
        return ctypes.CDLL(str(library))
    except (RuntimeError, OSError) as error:
        reason = f"{error!r}" if not str(error).strip() else str(error).strip().splitlines()[0]
        _warn(
            f"could not compile its kernel for CPUs ({reason})",
            "Install a C++ compiler, such as g++, and ninja; TORCH_EXTENSIONS_DIR, if set, must "
            "be a folder that can be written.",
        )
        return None


def _compile(library: Path, flags: list[str]) -> None:
    """Compile the kernel, unless another process of this host does it meanwhile."""
    from torch.utils import cpp_extension

    with open(library.with_suffix(".lock"), "w") as file:
        with contextlib.suppress(OSError):  # not every file system has it; then all compile
            fcntl.flock(file, fcntl.LOCK_EX)  # a process that is killed holds it no longer
        if library.exists():
            return
        # In a folder that nobody else knows: where cpp_extension finds the lock file of a process
        # that was killed, it waits for ever.
        with tempfile.TemporaryDirectory(dir=library.parent) as build, _ninja_on_path():
            built = cpp_extension.load(
                name=library.stem,
                sources=[str(_SOURCE)],
                extra_cflags=flags,
                extra_ldflags=_LINKER_FLAGS,
                build_directory=build,
                is_python_module=False,
            )
            os.replace(built, library)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let PATH lead to this environment's ninja, which it does not where none is activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _warn(problem: str, remedy: str) -> None:
    warnings.warn(
        f"alto_ds {problem} and uses PyTorch's operations, which take several times as long. "
        f"{remedy}",
        stacklevel=4,
    )
