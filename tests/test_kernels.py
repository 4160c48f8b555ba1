"""Every kernel against the reference: states bitwise, weights to the last bits."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alto_ds import ALTO
from alto_ds.kernels import Batch, FragmentTable, Hyperparameters, cpu, reference
from alto_ds.layout import Fragment
from alto_ds.trust_ratio import trust_ratios
from tests.launcher import ROOT

GPU = torch.cuda.is_available()
BLOCKS = (2048, 4096)  # elements that one program or thread takes at a time


def load_triton() -> Any:
    pytest.importorskip("triton")
    return importlib.import_module("alto_ds.kernels.triton")


def hyperparameters(**changes: Any) -> Hyperparameters:
    defaults = Hyperparameters(
        step=3,
        alpha=-5.0,
        beta1=0.99,
        beta2=0.9,
        beta3=0.99,
        bias_correction2=1 - 0.9**3,
        bias_correction3=1 - 0.99**3,
        eps=(1e-6, 1e-6, 1e-10),
        weight_decay=0.01,
        lr=0.01,
        scaled=True,
        trust_clip=None,
        rounding_key=0xDEADBEEF,
        guard=True,
    )
    return defaults._replace(**changes)


@st.composite
def fragments(draw: Any) -> list[Fragment]:
    """Tensors with fragments at any offset, with and without padding between them."""
    length = st.one_of(
        st.integers(1, 40), st.sampled_from([n + d for n in BLOCKS for d in (-1, 0, 1)])
    )
    found: list[Fragment] = []
    for tensor in range(draw(st.integers(1, 3))):
        end = 0
        for _ in range(draw(st.integers(0, 4))):
            offset = end + draw(st.integers(0, 9))
            end = offset + draw(length)
            start, whole = draw(st.integers(0, 2**33)), draw(st.booleans())
            found.append(Fragment(tensor, offset, end - offset, start, len(found), whole))
    return found


def make_batch(
    found: list[Fragment], param: torch.dtype, state: torch.dtype, seed: int, device: str = "cpu"
) -> Batch:
    """Random tensors for the fragments; all that lies in none is poison."""
    generator = torch.Generator().manual_seed(seed)
    columns: list[list[Tensor]] = [[], [], [], [], []]
    arithmetic = torch.promote_types(param, torch.float32)
    for place in range(max((f.tensor for f in found), default=0) + 1):
        own = [f for f in found if f.tensor == place]
        size = max((f.offset + f.length for f in own), default=0) + 3
        for column, dtype in zip(columns, (param, param, state, state, arithmetic), strict=True):
            tensor = torch.full((size,), 1e30 if column is columns[0] else torch.nan)
            for f in own:
                values = torch.randn(f.length, generator=generator)
                tensor[f.offset : f.offset + f.length] = values
            column.append(tensor.to(dtype).to(device))
        columns[4][-1].abs_()
    return Batch._make([*columns, FragmentTable(found)])


def columns_of(batch: Batch) -> list[Sequence[Tensor]]:
    return [batch.params, batch.grads, batch.exp_avg_grads, batch.exp_avgs, batch.exp_avg_sqs]


def copy_of(batch: Batch) -> Batch:
    columns = [[x.clone() for x in column] for column in columns_of(batch)]
    return Batch._make([*columns, batch.fragments])


def step(kernel: Any, batch: Batch, scalars: Hyperparameters) -> Tensor:
    """Both passes, as the optimizer runs them, on whole layers; returns the sums."""
    layers = max((f.layer for f in batch.fragments.fragments()), default=-1) + 1
    sums = torch.zeros(layers, 2, dtype=torch.float64, device=batch.params[0].device)
    kernel.update_states(batch, scalars, sums)
    ratios = torch.ones_like(sums[:, 0])
    if scalars.scaled:
        ratios = trust_ratios(sums, *scalars.eps[1:], scalars.trust_clip)
    kernel.apply_update(batch, scalars, scalars.lr * ratios)
    return sums


def bits(tensors: Any) -> list[list[int]]:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [x.cpu().view(kinds[x.element_size()]).tolist() for x in tensors]


def check_against_reference(kernel: Any, batch: Batch, scalars: Hyperparameters) -> None:
    expected, repeated = copy_of(batch), copy_of(batch)
    expected_sums = step(reference, expected, scalars)
    sums = step(kernel, batch, scalars)
    assert torch.allclose(sums, expected_sums, rtol=1e-6, atol=0)
    for states, right_states in zip(columns_of(batch)[1:], columns_of(expected)[1:], strict=True):
        assert bits(states) == bits(right_states)
    for found, right in zip(batch.params, expected.params, strict=True):
        # PyTorch's square root and the order of the sums move the last bits.
        rtol = 1e-6 if found.dtype == torch.float32 else 1e-13 if found.dtype.itemsize > 4 else 1e-2
        assert torch.allclose(found, right, rtol=rtol, atol=rtol, equal_nan=True)

    assert torch.equal(step(kernel, repeated, scalars), sums)
    for again, first in zip(columns_of(repeated), columns_of(batch), strict=True):
        assert bits(again) == bits(first)


FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
scalars_drawn = st.builds(
    hyperparameters,
    alpha=st.sampled_from([-5.0, 0.5, 0.0]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    scaled=st.booleans(),
    trust_clip=st.sampled_from([None, (0.5, 0.75)]),
    rounding_key=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("state", [FP32, BF16])
@pytest.mark.parametrize("param", [FP32, BF16])
@settings(max_examples=15, deadline=None)
@given(found=fragments(), scalars=scalars_drawn, seed=st.integers(0, 2**32))
def test_the_cpu_kernel_gives_the_references_bits(
    threads: int,
    param: torch.dtype,
    state: torch.dtype,
    found: list[Fragment],
    scalars: Hyperparameters,
    seed: int,
) -> None:
    batch = make_batch(found, param, state, seed)
    assert cpu.supports(batch), "no compiler, or ninja is missing"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_against_reference(cpu, batch, scalars)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=15, deadline=None)
@given(found=fragments(), scalars=scalars_drawn, seed=st.integers(0, 2**32))
def test_the_cpu_kernel_gives_the_references_bits_in_float64(
    found: list[Fragment], scalars: Hyperparameters, seed: int
) -> None:
    check_against_reference(cpu, make_batch(found, FP64, FP64, seed), scalars)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("state", [FP32, BF16])
def test_the_cpu_kernel_gives_the_references_bits_for_large_layers(
    threads: int, state: torch.dtype
) -> None:
    """More elements than one batch of the kernel has, and than it keeps between the passes."""
    offset, found = 3, []
    for layer, length in enumerate([100_000, 7, 70_001, 2_300_003, 9, 200_000]):
        found.append(Fragment(0, offset, length, 0, layer, whole=layer != 4))
        offset += length + layer
    torch.set_num_threads(threads)
    try:
        check_against_reference(cpu, make_batch(found, FP32, state, 1), hyperparameters())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("state", [FP32, BF16])
@pytest.mark.parametrize("param", [FP32, BF16])
@settings(max_examples=8, deadline=None)
@given(found=fragments(), scalars=scalars_drawn, seed=st.integers(0, 2**32))
def test_the_triton_kernel_gives_the_references_bits(
    param: torch.dtype,
    state: torch.dtype,
    found: list[Fragment],
    scalars: Hyperparameters,
    seed: int,
) -> None:
    kernel = load_triton()
    batch = make_batch(found, param, state, seed, "cuda" if GPU else "cpu")
    assert kernel.supports(batch)
    check_against_reference(kernel, batch, scalars)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25])
@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("state", [FP32, BF16])
def test_the_triton_kernel_keeps_out_what_is_not_finite(
    state: torch.dtype, column: int, value: float
) -> None:
    """As the reference: no state becomes anything but finite, no weight of the layer changes."""
    kernel = load_triton()
    found = [Fragment(0, 3, 5000, 7, 0, True), Fragment(0, 5010, 40, 0, 1, True)]
    batch = make_batch(found, FP32, state, 1, "cuda" if GPU else "cpu")
    columns_of(batch)[column][0][3 + 2345] = value
    before, expected = copy_of(batch), copy_of(batch)
    sums = torch.zeros(2, 2, dtype=torch.float64, device=batch.params[0].device)
    right_sums = sums.clone()
    for one, into, kernel_ in ((batch, sums, kernel), (expected, right_sums, reference)):
        kernel_.update_states(one, hyperparameters(), into)
        # Of a layer whose sums are not finite the step size is 0.
        sizes = into.isfinite().all(1).to(torch.float64) * 0.01
        kernel_.apply_update(one, hyperparameters(), sizes)
    assert torch.equal(sums.isfinite().all(1), right_sums.isfinite().all(1))
    fine = sums[0].isfinite().all()
    assert not fine or value == 1e25
    assert sums[1].isfinite().all()
    for after, then, right in zip(*map(columns_of, (batch, before, expected)), strict=True):
        assert torch.equal(after[0].isfinite(), then[0].isfinite())
        assert torch.allclose(after[0][5010:5050], right[0][5010:5050], rtol=1e-6)
        bad_block = slice(3 + 2048, 3 + 4096)
        if not fine:
            assert bits([after[0][bad_block]]) == bits([then[0][bad_block]])
    if not fine:
        assert bits([batch.params[0][3:5003]]) == bits([before.params[0][3:5003]])


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_bf16_parameters_are_rounded_to_nearest_even(name: str) -> None:
    """Of all parameters there are, 3/4 is taken, which falls half-way for every fourth of them."""
    if name == "triton" and not GPU:
        pytest.skip("Triton's interpreter does not round to bfloat16 as a GPU does")
    kernel = load_triton() if name == "triton" else {"reference": reference, "cpu": cpu}[name]
    device = "cuda" if GPU and name == "triton" else "cpu"
    param = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16).to(device)
    expected = (param.float() - param.float() * 0.25).to(BF16)
    n = len(param)
    found = [Fragment(0, 0, n, 0, 0, whole=False)]
    zeros = [torch.zeros(n, device=device) for _ in range(2)]
    grad = torch.zeros(n, dtype=BF16, device=device)
    batch = Batch([param], [grad], [], [zeros[0]], [zeros[1]], FragmentTable(found))
    step(kernel, batch, hyperparameters(alpha=0.0, weight_decay=0.25, lr=1.0, scaled=False))
    assert torch.allclose(param, expected, rtol=0, atol=0, equal_nan=True)


def test_the_triton_kernel_compiles_for_gpus_without_fused_operations() -> None:
    """Where there is no GPU the kernels are run interpreted only; this compiles them to PTX."""
    pytest.importorskip("triton")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.scripts.compile_triton"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    compiled = json.loads(finished.stdout)
    assert len(compiled) == 25
    for code in compiled:
        assert code["fused multiply-adds"] == 0
        assert code["local memory"] is False


def test_norms_of_100_million_elements_are_right() -> None:
    """All of one layer, straight from torch.empty's memory: 2 GB."""
    torch.manual_seed(1)
    n = 100_000_001
    params, grads = torch.randn(n), torch.randn(n)
    found = [Fragment(0, 0, n, 0, 0, whole=False)]
    batch = Batch([params], [grads], [], [torch.zeros(n)], [torch.zeros(n)], FragmentTable(found))
    sums = torch.zeros(1, 2, dtype=torch.float64)
    cpu.update_states(batch, hyperparameters(alpha=0.0), sums)
    expected = sum(part.double().square().sum() for part in params.split(2**22))
    assert abs(sums[0, 0].item() / float(expected) - 1) < 1e-12


def test_a_state_that_bf16_cannot_hold_is_right_in_the_mean() -> None:
    """Rounded to nearest, an average would stand still once its steps are below 2^-9 of it."""
    n, steps = 4096, 2000
    param = torch.nn.Parameter(torch.ones(n))
    optimizer = ALTO([param], lr=0.0, betas=(0.999, 0.999, 0.999), alpha=-5.0, state_dtype="bf16")
    for _ in range(steps):
        param.grad = torch.ones(n)
        optimizer.step()
    found = optimizer.state[param]["exp_avg_grad"].float()
    expected = 1 - 0.999**steps
    assert optimizer.state[param]["exp_avg_grad"].dtype == BF16
    assert abs(found.mean() - expected) < 5e-4
    assert 1e-3 < found.std() < 2e-2  # elements are rounded independently


def test_rounding_is_the_same_however_a_layer_is_cut() -> None:
    s, m = torch.randn(1000), torch.randn(1000)
    whole = reference.round_stochastically(s, m, 0, 42)
    parts = [
        reference.round_stochastically(s[a:b], m[a:b], a, 42) for a, b in ((0, 333), (333, 1000))
    ]
    other_key = reference.round_stochastically(s, m, 0, 43)[1]
    assert not torch.equal(whole[1], other_key)
    for rounded, first, second, exact in zip(whole, *parts, (s, m), strict=True):
        assert rounded is not None
        assert first is not None
        assert second is not None
        assert torch.equal(rounded, torch.cat([first, second]))
        assert torch.equal(rounded.to(BF16).float(), rounded)
        assert ((rounded - exact).abs() <= exact.abs() * 2**-7).all()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("compiler", r"could not compile its kernel for CPUs \(Ninja is .*\).* C\+\+ compiler"),
        ("source", r"has no source of its kernel for CPUs .*Install alto-ds again"),
    ],
)
def test_without_its_kernel_there_is_one_warning_and_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, message: str
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    if missing == "compiler":
        monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    else:
        monkeypatch.setattr(cpu, "_SOURCE", Path("no_such_file.cpp"))
    cpu._library.cache_clear()
    param = torch.nn.Parameter(torch.ones(3))
    twin = torch.nn.Parameter(torch.ones(3))
    param.grad = twin.grad = torch.tensor([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match=message) as warned:
        ALTO([param]).step()
    ALTO([param]).step()
    assert len(warned) == 1
    monkeypatch.undo()
    cpu._library.cache_clear()
    for _ in range(2):
        ALTO([twin]).step()
    assert torch.allclose(param, twin, rtol=1e-6)


def test_a_process_that_is_killed_while_it_compiles_the_kernel_keeps_no_other_waiting(
    tmp_path: Path,
) -> None:
    """That of a node that is lost, or of a job whose time is over at its first step."""
    program = "from alto_ds.kernels import cpu; assert cpu._library() is not None"
    command = [sys.executable, "-W", "error", "-c", program]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    killed = subprocess.Popen(command, env=environment, cwd=ROOT)
    while not list(tmp_path.rglob("build.ninja")):
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120)
