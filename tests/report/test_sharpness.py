"""The largest eigenvalue is the Hessian's, and directions are normalised by filter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from alto_ds.compare.hessian import hessian_product, largest_eigenvalue
from alto_ds.compare.run import Conditions, Run, finish, sharpness
from alto_ds.compare.spec import Entry, SearchSettings, Spec, VisionSettings
from alto_ds.compare.vision import VisionTask
from alto_ds.report.sharpness import (
    DISTANCES,
    filter_normalised,
    losses_along,
    measure,
)
from tests.report.folders import add_model, tiny_model, write_run


@pytest.mark.parametrize(
    ("eigenvalues", "largest"),
    [
        ([5.0, 2.0, 0.1, -1.0], 5.0),
        ([-5.0, 2.0, 0.1, -1.0], 2.0),  # the one of largest magnitude is negative
        ([-5.0, -2.0, -1.0], -1.0),
        ([0.0, 0.0], 0.0),
    ],
)
def test_the_largest_eigenvalue_of_a_quadratic_is_found(
    eigenvalues: list[float], largest: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    size = len(eigenvalues)
    random = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(random).Q
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    weights = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def product(vector: Tensor) -> Tensor:
        return hessian_product(lambda: [weights @ matrix @ weights / 2], [weights], vector)

    start = torch.randn(size, generator=generator, dtype=torch.float64)
    found = largest_eigenvalue(product, start, tolerance=1e-9, most=500)
    assert found.value == pytest.approx(largest, abs=1e-8)
    assert found.residual <= 1e-8


def test_what_has_not_converged_says_so_by_its_residual() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.999], dtype=torch.float64))
    found = largest_eigenvalue(matrix.mv, torch.tensor([0.1, 1.0], dtype=torch.float64), 1e-9, 5)
    assert found.products == 5
    assert 1e-6 < found.residual < 1e-3
    assert abs(found.value - 1.0) <= 1e-3  # of an eigenvalue, and so of either


def hessian(tokens: Tensor) -> Tensor:
    """Of the tiny model's loss, by torch.autograd.functional, in double precision."""
    model = tiny_model().double()
    names = [name for name, _ in model.named_parameters()]
    params = [param.detach() for param in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([param.numel() for param in params])
        shaped = [part.view_as(param) for part, param in zip(parts, params, strict=True)]
        weights = dict(zip(names, shaped, strict=True))
        return functional_call(model, weights, kwargs={"input_ids": tokens, "labels": tokens}).loss

    with sdpa_kernel(SDPBackend.MATH):
        flat = torch.cat([param.flatten() for param in params])
        return torch.autograd.functional.hessian(loss, flat)


def test_a_runs_sharpness_is_that_of_its_models_whole_hessian(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seq_length=6)
    tokens = add_model(run)
    found = measure(run, sequences=20)
    exact = torch.linalg.eigvalsh(hessian(tokens))
    assert found.sequences == 20
    assert found.eigenvalue.residual <= 1e-2 * found.eigenvalue.value
    assert found.eigenvalue.value == pytest.approx(exact[-1].item(), rel=1e-3)
    model = tiny_model()
    with torch.no_grad():
        assert found.loss == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-6)
    middle = DISTANCES.index(0.0)
    assert [losses[middle] for losses in found.losses] == [found.loss] * len(found.losses)
    assert len({losses[0] for losses in found.losses}) == len(found.losses)
    few = measure(run, sequences=4)
    assert measure(run, sequences=4) == few
    with torch.no_grad():
        spread = model(tokens[::5], labels=tokens[::5]).loss.item()
    assert (few.sequences, few.loss) == (4, pytest.approx(spread, rel=1e-6))


class At(nn.Module):
    """A model at other weights, which are no parameters."""

    def __init__(self, model: nn.Module, flat: Tensor) -> None:
        super().__init__()
        self.model = model
        named = dict(model.named_parameters())
        parts = flat.split([param.numel() for param in named.values()])
        self.at = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts, strict=True)}

    def forward(self, pixels: Tensor) -> Tensor:
        return functional_call(self.model, self.at, (pixels,))


def test_a_final_run_measures_sharpness_on_its_first_training_examples(tmp_path: Path) -> None:
    digits = VisionSettings(type="vision", dataset="digits", hidden=[4])
    spec = Spec(
        task=digits,
        optimizers={"SGD": Entry(type="SGD", params={"lr": 0.1})},
        search=SearchSettings(method="random", trials=1),
        seeds=[1],
        batch_size=32,
        micro_batch_size=16,
        steps=3,
        sharpness=24,
    )
    task = VisionTask(digits)
    model = task.model(1)
    batch = next(task.batches(1, 24, 24))
    flat = torch.cat([param.detach().flatten() for param in model.parameters()])
    exact = torch.autograd.functional.hessian(lambda w: task.loss(At(model, w), batch), flat)
    found = sharpness(task, model, 1, spec)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(exact)[-1].item(), rel=1e-3)
    assert found.products > 1

    for name in ("runs", "curves", "ratios"):
        (tmp_path / name).mkdir()
    conditions = Conditions(fingerprint="", device="cpu", versions={})
    for stage, measured in (("search", False), ("final", True)):
        run = Run(
            optimizer="SGD",
            type="SGD",
            params={"lr": 0.1},
            stage=stage,
            seed=1,
            conditions=conditions,
        )
        assert ("sharpness" in finish(run, spec, tmp_path)) == measured
        # What was done without it is done again, and nothing else.
        assert (run.key(spec) != run.key(replace(spec, sharpness=0))) == measured


def test_each_filter_of_a_direction_is_as_long_as_the_models() -> None:
    model = tiny_model()
    direction = filter_normalised(model, torch.Generator().manual_seed(1))
    for (name, param), along in zip(model.named_parameters(), direction, strict=True):
        if param.ndim < 2:
            assert not along.any()
            continue
        # GPT-2 keeps matrices as [inputs, outputs]; an embedding has a row for each token.
        inputs = 1 if name.endswith(("wte.weight", "wpe.weight")) else 0
        torch.testing.assert_close(along.norm(dim=inputs), param.norm(dim=inputs))
        assert not torch.equal(along, param)


def test_the_weights_stay_as_they_were_also_after_an_error() -> None:
    model = tiny_model()
    params = [*model.parameters()]
    before = [param.detach().clone() for param in params]
    direction = filter_normalised(model, torch.Generator().manual_seed(1))

    def first() -> float:
        return params[0].sum().item()

    found = losses_along(params, direction, first, [0.0, 0.5])
    moved = (before[0] + 0.5 * direction[0]).sum().item()
    assert found == [before[0].sum().item(), moved]

    def fails() -> float:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        losses_along(params, direction, fails, [0.5])
    for param, weight in zip(params, before, strict=True):
        assert torch.equal(param, weight)
