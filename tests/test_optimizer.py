"""ALTO in one process: the paper's equations by hand, settings, and what torch optimizers do."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alto_ds import ALTO

PAPER_EPS = (0.1, 0.2, 0.3)
STATES = ("exp_avg_grad", "exp_avg", "exp_avg_sq")


def quadratic(*values: list[float], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in values]


def train(optimizer: Any, params: list[nn.Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p * p * (i + 1)).sum() for i, p in enumerate(params)).backward()  # type: ignore[union-attr]
        optimizer.step()


def by_hand(theta: list[float], gradients: list[list[float]], vanilla: bool) -> list[float]:
    """Algorithm 2 of the paper (1 where ``vanilla``) in plain floats, with its own a and g_k-1."""
    alpha, (b1, b2, b3), lr, decay = -5.0, (0.9, 0.8, 0.7), 0.5, 0.25
    eps1, eps2, eps3 = PAPER_EPS
    n = range(len(theta))
    a, m, v, previous = ([0.0 for _ in n] for _ in range(4))
    for k, g in enumerate(gradients, start=1):
        a = [b1 * a[i] + (1 - b1) * (g[i] - previous[i]) for i in n]
        previous = g
        h = [g[i] + alpha * a[i] for i in n]
        m = [b2 * m[i] + (1 - b2) * h[i] for i in n]
        v = [b3 * v[i] + (1 - b3) * h[i] ** 2 for i in n]
        c2, c3 = (1.0, 1.0) if vanilla else (1 - b2**k, 1 - b3**k)
        r = [m[i] / c2 / (math.sqrt(v[i] / c3) + eps1) + decay * theta[i] for i in n]
        phi = math.sqrt(sum(x * x for x in theta)) + eps3
        ratio = phi / (math.sqrt(sum(x * x for x in r)) + eps2 * phi)
        theta = [theta[i] - lr * ratio * r[i] for i in n]
    return theta


@pytest.mark.parametrize("vanilla", [False, True])
def test_the_papers_algorithms_with_phi_and_all_eps(vanilla: bool) -> None:
    gradients = [[1.0, -2.0, 0.5], [0.25, 1.0, -1.0], [-3.0, 0.0, 2.0]]
    (param,) = quadratic([3.0, -4.0, 12.0])
    optimizer = ALTO(
        [param],
        lr=0.5,
        betas=(0.9, 0.8, 0.7),
        alpha=-5.0,
        eps=PAPER_EPS,
        weight_decay=0.25,
        bias_correction=not vanilla,
    )
    for gradient in gradients:
        param.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    expected = by_hand([3.0, -4.0, 12.0], gradients, vanilla)
    assert param.tolist() == pytest.approx(expected, rel=1e-12)


def test_first_trust_ratio_is_the_hand_computed_one() -> None:
    # ‖θ‖ = 5, g = 1 and α = 0 give r = 1 / (1 + 0) = 1 each: ‖r‖ = √2.
    (param,) = quadratic([3.0, 4.0])
    optimizer = ALTO([("w", param)], alpha=0.0, eps=(0.0, 0.5, 1.0), weight_decay=0.0, lr=1.0)
    optimizer.param_groups[0]["trust_ratio"] = True
    param.grad = torch.ones_like(param)
    optimizer.step()
    ratio, weight_norm, update_norm = optimizer.trust_ratios()["w"]
    assert (weight_norm, update_norm) == pytest.approx((5.0, math.sqrt(2)))
    assert ratio == pytest.approx(6 / (math.sqrt(2) + 0.5 * 6))
    assert param.tolist() == pytest.approx([3 - ratio, 4 - ratio])


@pytest.mark.parametrize(
    ("group", "adapted"),
    [
        ({"weight_decay": 0.1}, True),
        ({"weight_decay": 0.0}, False),
        ({"weight_decay": 0.1, "trust_ratio": False}, False),
        ({"weight_decay": 0.0, "trust_ratio": True}, True),
    ],
)
def test_groups_choose_whether_they_are_adapted(group: dict[str, Any], adapted: bool) -> None:
    (param,) = quadratic([30.0, 40.0])
    settings: dict[str, Any] = {"params": [("w", param)], **group}
    optimizer = ALTO([settings])
    train(optimizer, [param], 1)
    assert (optimizer.trust_ratios()["w"].ratio != 1.0) is adapted


@pytest.mark.parametrize("zeros", ["weights", "update"])
def test_ratio_is_1_where_a_norm_is_0(zeros: str) -> None:
    (param,) = quadratic([0.0, 0.0] if zeros == "weights" else [1.0, 1.0])
    optimizer = ALTO([("w", param)], weight_decay=0.0)
    optimizer.param_groups[0]["trust_ratio"] = True
    param.grad = torch.ones_like(param) if zeros == "weights" else torch.zeros_like(param)
    optimizer.step()
    assert optimizer.trust_ratios()["w"].ratio == 1.0
    assert bool(param.isfinite().all())


def test_trust_clip_bounds_the_ratio() -> None:
    large, small = quadratic([1e4, 1e4], [1e-4, 1e-4])
    optimizer = ALTO([("large", large), ("small", small)], trust_clip=(0.01, 10))
    train(optimizer, [large, small], 1)
    ratios = optimizer.trust_ratios()
    assert (ratios["large"].ratio, ratios["small"].ratio) == (10, 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -100.0}, r"alpha=-100.*\|alpha\| must be below .* = 100;"),
        ({"alpha": 1.2, "betas": (0.01, 0.9, 0.99)}, r"alpha=1\.2 .* = 1\.0101"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"betas": (1.0, 0.9, 0.99)}, r"betas\[0\]=1\.0 .* < 1"),
        ({"betas": (0.9, 0.9, -0.1)}, r"betas\[2\]=-0\.1"),
        ({"betas": (0.9, 0.99)}, "betas=.*three numbers"),
        ({"betas": "auto"}, "betas='auto'.*three numbers"),
        ({"lr": -1.0}, "lr=-1.0 .* lr >= 0"),
        ({"lr": "auto"}, "lr='auto' must be made of numbers"),
        ({"alpha": "auto"}, "alpha='auto' must be made of numbers"),
        ({"betas": (0.9, "x", 0.9)}, "betas=.* must be made of numbers"),
        ({"eps": None}, "eps=None must be made of numbers"),
        ({"trust_clip": 5}, "trust_clip=5 must be"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"eps": -1e-6}, "eps=-1e-06"),
        ({"eps": (1e-6, 1e-6)}, "eps=.*three numbers"),
        ({"eps": (1e-6, -1.0, 0.0)}, "eps=.*eps >= 0"),
        ({"trust_clip": (10, 0.01)}, "trust_clip=.*low <= high"),
        ({"trust_clip": (1,)}, "trust_clip="),
        ({"state_dtype": "fp16"}, 'state_dtype=\'fp16\' must be "fp32", or "bf16"'),
        ({"seed": 0.5}, "seed=0.5 must be a whole number"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALTO(quadratic([1.0]), **settings)
    with pytest.raises(ValueError, match=message):  # in a group, likewise
        ALTO([dict(settings, params=quadratic([1.0]))])


def test_complex_parameters_and_sparse_gradients_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="parameter wave is complex"):
        ALTO([("wave", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
    table = nn.Embedding(4, 2, sparse=True)
    first = nn.Parameter(torch.ones(2))
    optimizer = ALTO([("first", first), ("table.weight", table.weight)])
    (table(torch.tensor([1])).sum() + first.sum()).backward()
    with pytest.raises(RuntimeError, match=r"gradient of table\.weight is sparse"):
        optimizer.step()
    assert first.tolist() == [1, 1]  # nothing was changed
    assert not optimizer.state


def test_unknown_flat_tensors_are_refused() -> None:
    params = quadratic([1.0, 2.0], [3.0])
    optimizer = ALTO(params)
    flat = torch.zeros(3, requires_grad=True)
    flat.grad = torch.ones(3)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"does not know which layers .* \[\(3,\)\]"):
        optimizer.step()


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_parameters_of_fsdp1_are_refused_by_name(mark: str) -> None:
    """FSDP1 sets these attributes; it needs an accelerator, so here they are set by hand."""
    table = nn.Parameter(torch.ones(4))
    setattr(table, mark, True)
    optimizer = ALTO([("table", table)])
    table.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="parameter table, which FullyShardedDataParallel"):
        optimizer.step()


def test_closure_is_evaluated_with_gradients() -> None:
    (param,) = quadratic([1.0, 2.0])
    optimizer = ALTO([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert param[0] < 1.0


def test_parameters_without_gradient_are_left_alone() -> None:
    used, dead = quadratic([1.0, 2.0], [3.0])
    optimizer = ALTO([used, dead])
    train(optimizer, [used], 3)
    assert dead.item() == 3.0
    assert dead not in optimizer.state


def test_groups_and_schedulers_set_their_own_lr() -> None:
    slow, fast = quadratic([1.0, 2.0], [1.0, 2.0])
    groups: list[dict[str, Any]] = [{"params": [slow], "lr": 0.0}, {"params": [fast]}]
    optimizer = ALTO(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    train(optimizer, [slow, fast], 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.05]
    assert slow.tolist() == [1.0, 2.0]
    assert fast.tolist() != [1.0, 2.0]


def test_lr_may_be_a_tensor() -> None:
    tensor, number = quadratic([1.0, 2.0], [1.0, 2.0])
    train(ALTO([tensor], lr=torch.tensor(0.1, dtype=torch.float64)), [tensor], 3)
    train(ALTO([number], lr=0.1), [number], 3)
    assert tensor.tolist() == number.tolist()


def test_added_groups_are_updated() -> None:
    first, second = quadratic([1.0, 2.0], [3.0, 4.0])
    optimizer = ALTO([("first", first)])
    optimizer.add_param_group({"params": [("second", second)], "lr": 0.5})
    train(optimizer, [first, second], 2)
    assert set(optimizer.trust_ratios()) == {"first", "second"}
    assert second.tolist() != [3.0, 4.0]


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_restored_optimizer_goes_on_bitwise(how: str) -> None:
    params = quadratic([1.0, -2.0, 3.0], [0.5], dtype=torch.float32)
    groups: list[dict[str, Any]] = [
        {"params": params[:1]},
        {"params": params[1:], "weight_decay": 0.0},
    ]
    optimizer = ALTO(groups)
    train(optimizer, params, 5)
    if how == "state_dict":
        restored_params = copy.deepcopy(params)
        restored = ALTO([{"params": restored_params[:1]}, {"params": restored_params[1:]}])
        before = list(restored.param_groups)
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert all(a is b for a, b in zip(before, restored.param_groups, strict=True))
    else:
        pair = (optimizer, params)
        restored, restored_params = (
            pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
        )
    train(optimizer, params, 5)
    train(restored, restored_params, 5)
    assert [p.tolist() for p in params] == [p.tolist() for p in restored_params]


def test_states_of_bf16_parameters_are_fp32_and_stay_so() -> None:
    params = quadratic([1.0, -2.0, 3.0], dtype=torch.bfloat16)
    optimizer = ALTO(params)
    train(optimizer, params, 3)
    restored = ALTO(copy.deepcopy(params))
    restored.load_state_dict(optimizer.state_dict())
    state, expected = restored.state_dict()["state"][0], optimizer.state_dict()["state"][0]
    for key in STATES:
        assert state[key].dtype == torch.float32
        assert state[key].tolist() == expected[key].tolist()


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_bf16_states_are_restored_and_rounded_on_bitwise(how: str) -> None:
    params = quadratic([1.0, -2.0, 3.0], [0.5], dtype=torch.float32)
    optimizer = ALTO(params, state_dtype="bf16", seed=7)
    train(optimizer, params, 5)
    if how == "state_dict":
        restored_params = copy.deepcopy(params)
        restored = ALTO(restored_params, state_dtype="bf16", seed=7)
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        pair = (optimizer, params)
        restored, restored_params = (
            pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
        )
    dtypes = {key: restored.state[restored_params[0]][key].dtype for key in STATES}
    assert dtypes == dict(zip(STATES, (torch.bfloat16, torch.bfloat16, torch.float32), strict=True))
    train(optimizer, params, 5)
    train(restored, restored_params, 5)
    assert [p.tolist() for p in params] == [p.tolist() for p in restored_params]


def test_seeds_round_differently() -> None:
    params = [quadratic([1.0, -2.0, 3.0], dtype=torch.float32)[0] for _ in range(3)]
    for param, seed in zip(params, (0, 0, 1), strict=True):
        train(ALTO([param], state_dtype="bf16", seed=seed, lr=0.1), [param], 5)
    assert torch.equal(params[0], params[1])
    assert not torch.equal(params[0], params[2])


def test_going_on_with_alpha_after_lamb_is_refused() -> None:
    params = quadratic([1.0, 2.0])
    lamb = ALTO(params, alpha=0.0)
    train(lamb, params, 1)
    lamb.param_groups[0]["alpha"] = -5.0
    with pytest.raises(RuntimeError, match="needs the state exp_avg_grad"):
        train(lamb, params, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_in_memory_do_not_matter(transposed: bool) -> None:
    values = torch.arange(1.0, 7.0).view(2, 3)
    param = nn.Parameter(values.t().contiguous().t() if transposed else values.clone())
    twin = nn.Parameter(values.clone())
    train(ALTO([param]), [param], 4)
    train(ALTO([twin]), [twin], 4)
    assert torch.allclose(param, twin, rtol=1e-6)


def test_a_grad_scaler_unscales_before_the_step() -> None:
    """torch.amp.GradScaler, where layers are whole: scaled gradients make no difference."""
    (scaled,), (plain,) = quadratic([1.0, 2.0]), quadratic([1.0, 2.0])
    scaled_optimizer, optimizer = ALTO([scaled], lr=0.1), ALTO([plain], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        for param, one in ((scaled, scaled_optimizer), (plain, optimizer)):
            one.zero_grad()
            loss = (param**2).sum()
            (scaler.scale(loss) if one is scaled_optimizer else loss).backward()
        scaler.step(scaled_optimizer)
        scaler.update()
        optimizer.step()
    assert torch.equal(scaled, plain)


def test_superoffload_is_refused() -> None:
    """It runs on CUDA only, so its class is a stand-in; see tests/sharding for ZenFlow."""
    (param,) = quadratic([1.0])
    optimizer = ALTO([param])
    param._z3_optimizer = type("SuperOffloadOptimizer_Stage3", (), {})()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match='remove "super_offload" from "offload_optimizer"'):
        _ = optimizer.param_groups
