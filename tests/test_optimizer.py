"""ALTO in one process: the paper's equations by hand, settings, and what torch optimizers do."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alto_ds import ALTO
from alto_ds.layout import Layout

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
    group: dict[str, Any] = {"params": [("w", param)], "weight_decay": 0.0, "trust_ratio": True}
    optimizer = ALTO([group], alpha=0.0, eps=(0.0, 0.5, 1.0), lr=1.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    ratio, weight_norm, update_norm, scaled = optimizer.trust_ratios()["w"]
    assert scaled
    assert (weight_norm, update_norm) == pytest.approx((5.0, math.sqrt(2)))
    assert ratio == pytest.approx(6 / (math.sqrt(2) + 0.5 * 6))
    assert param.tolist() == pytest.approx([3 - ratio, 4 - ratio])


@pytest.mark.parametrize(
    ("group", "scaled"),
    [
        ({"weight_decay": 0.1}, True),
        ({"weight_decay": 0.0}, False),
        ({"weight_decay": 0.1, "trust_ratio": False}, False),
        ({"weight_decay": 0.0, "trust_ratio": True}, True),
    ],
)
def test_groups_beside_a_decayed_one_choose_whether_they_are_scaled(
    group: dict[str, Any], scaled: bool
) -> None:
    param, other = quadratic([30.0, 40.0], [1.0])
    groups: list[dict[str, Any]] = [{"params": [("w", param)], **group}, {"params": [("o", other)]}]
    optimizer = ALTO(groups)
    train(optimizer, [param, other], 1)
    assert (optimizer.trust_ratios()["w"].ratio != 1.0) is scaled
    assert optimizer.trust_ratios()["w"].scaled is scaled


def ones(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of one parameter each."""
    return [dict(group, params=[nn.Parameter(torch.ones(3, 2))]) for group in groups]


def take_step(optimizer: ALTO) -> ALTO:
    train(optimizer, [param for group in optimizer.param_groups for param in group["params"]], 1)
    return optimizer


def decided(optimizer: ALTO) -> list[bool]:
    return [group["trust_ratio"] for group in optimizer.param_groups]


NOTHING_DECAYS = "no parameter group has weight decay, so all"


def test_where_nothing_decays_all_layers_are_scaled_and_one_warning_says_so() -> None:
    optimizer = ALTO(ones({}, {"lr": 0.1}), weight_decay=0.0)
    with pytest.warns(UserWarning, match=NOTHING_DECAYS) as warned:
        take_step(take_step(optimizer))
    assert len(warned) == 1
    assert "zero.Init" not in str(warned[0].message)
    optimizer.add_param_group(ones({})[0])  # a later group is treated alike
    take_step(optimizer)
    assert decided(optimizer) == [True, True, True]
    assert all(row.scaled and row.ratio != 1 for row in optimizer.trust_ratios().values())


def test_a_weight_decay_that_a_scheduler_sets_to_0_at_once_is_none() -> None:
    """As Megatron's scheduler does when it is made, by the groups' wd_mult."""
    optimizer = ALTO(ones({"wd_mult": 0.0}, {"wd_mult": 0.0}), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1 * group["wd_mult"]
    with pytest.warns(UserWarning, match=NOTHING_DECAYS):
        take_step(optimizer)
    assert decided(optimizer) == [True, True]


def test_a_decayed_group_that_is_empty_or_frozen_is_none() -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [frozen]}]
    optimizer = ALTO([*groups, *ones({"weight_decay": 0.0})])
    optimizer.param_groups[2]["params"][0].grad = torch.ones(3, 2)
    with pytest.warns(UserWarning, match=NOTHING_DECAYS):
        optimizer.step()
    assert decided(optimizer)[2] is True


def test_a_weight_decay_that_goes_to_0_later_changes_nothing_else() -> None:
    optimizer = take_step(ALTO(ones({"weight_decay": 0.1}, {"weight_decay": 0.0})))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(optimizer)
    assert decided(optimizer) == [True, False]
    assert decided(copy.deepcopy(optimizer)) == [True, False]


@pytest.mark.parametrize("said", [{"trust_ratio": False}, {"weight_decay": 0.1}])
def test_there_is_no_warning_where_a_group_decays_or_says_trust_ratio(said: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = take_step(ALTO(ones({}, said), weight_decay=0.0))
    assert decided(optimizer)[0] is False


def test_states_of_a_run_in_which_nothing_decayed_are_scaled_too_and_say_so() -> None:
    """A checkpoint of the time when such a run had no trust ratios, loaded into a decayed one."""
    saved = ALTO(ones({}, {})).state_dict()
    for group in saved["param_groups"]:
        group["weight_decay"] = 0.0
    optimizer = take_step(ALTO(ones({}, {})))
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match=NOTHING_DECAYS):
        take_step(optimizer)
    assert decided(optimizer) == [True, True]


def test_the_warning_names_the_placeholders_of_zero_init() -> None:
    """As zero.Init leaves parameters; tests/sharding has the real ones."""
    params: list[Any] = [nn.Parameter(torch.empty(0)) for _ in range(2)]
    params[0].ds_shape, params[1].ds_shape = torch.Size([4, 3]), torch.Size([3])
    with pytest.warns(UserWarning, match=r"partitioned by deepspeed\.zero\.Init.*param\.ds_shape"):
        ALTO(params, weight_decay=0.0).step()


@pytest.mark.parametrize("zeros", ["weights", "update"])
def test_ratio_is_1_where_a_norm_is_0(zeros: str) -> None:
    (param,) = quadratic([0.0, 0.0] if zeros == "weights" else [1.0, 1.0])
    group: dict[str, Any] = {"params": [("w", param)], "weight_decay": 0.0, "trust_ratio": True}
    optimizer = ALTO([group])
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
        ({"alpha": float("nan")}, "alpha=nan must be finite"),
        ({"alpha": float("inf"), "betas": (1.0, 0.9, 0.9)}, "alpha=inf must be finite"),
        ({"lr": float("inf")}, "lr=inf must be finite"),
        ({"lr": torch.tensor(float("nan"))}, r"lr=tensor\(nan\) must be finite"),
        ({"lr": torch.ones(2)}, "lr=.* must be made of numbers"),
        ({"lr": True}, "lr=True must be made of numbers"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be finite"),
        ({"eps": (1e-6, float("inf"), 0)}, "eps=.* must be finite"),
        ({"betas": (0.9, float("nan"), 0.9)}, "betas=.* must be finite"),
        ({"trust_clip": (0.1, float("inf"))}, "trust_clip=.* must be finite"),
        ({"bias_correction": "false"}, "bias_correction='false' must be true or false"),
        ({"bias_correction": 0}, "bias_correction=0 must be true or false"),
        ({"betas": (1.0, 0.9, 0.99)}, r"betas\[0\]=1\.0 .* < 1"),
        ({"betas": (0.9, 0.9, -0.1)}, r"betas\[2\]=-0\.1"),
        ({"betas": (0.9, 0.99)}, "betas=.*three numbers"),
        ({"betas": "auto"}, "betas='auto'.*three numbers.* \"auto\" is for DeepSpeed's JSON"),
        ({"lr": -1.0}, "lr=-1.0 .* lr >= 0"),
        ({"lr": "auto"}, "lr='auto' must be made of numbers"),
        ({"alpha": "auto"}, "alpha='auto'.*numbers.* \"auto\" is for DeepSpeed's JSON"),
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
        ({"seed": True}, "seed=True must be a whole number"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALTO(quadratic([1.0]), **settings)
    with pytest.raises(ValueError, match=message):  # in a group, likewise
        ALTO([dict(settings, params=quadratic([1.0]))])


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("weight_decy", "weight_decay"),
        ("weight-decay", "weight_decay"),
        ("beta", "betas"),
        ("aplha", "alpha"),
        ("trust_ratios", "trust_ratio"),
        ("Bias_Correction", "bias_correction"),
        ("param_name", "param_names"),
    ],
)
def test_misspelt_keys_of_groups_are_refused_with_the_right_name(key: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.* is no setting of ALTO; did you mean '{right}'"):
        ALTO([{"params": quadratic([1.0]), key: 0.1}])


def test_keys_that_schedulers_and_frameworks_keep_in_groups_are_left_alone() -> None:
    others = [
        *("base_weight_decay", "weight_decay_mult", "init_weight_decay", "param_shapes"),
        *("initial_lr", "max_lr", "min_lr", "lr_mult", "wd_mult", "lr_scale", "name", "moe"),
        *("is_expert_parallel", "is_decoupled_lr", "pre_wd_mult", "decoupled_weight_decay"),
        *("step", "default_config", "use_muon", "base_momentum", "fused", "amsgrad", "maximize"),
    ]
    optimizer = ALTO([{"params": quadratic([1.0]), **dict.fromkeys(others, 1)}])
    optimizer.param_groups[0]["weight_dekay"] = 1  # whatever a scheduler adds later
    copy.deepcopy(optimizer)
    pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", float("nan"), "lr=nan must be finite"),
        ("alpha", 200.0, "alpha=200.0 is out of bounds"),
        ("weight_decay", -1.0, "weight_decay=-1.0 is out of bounds"),
        ("bias_correction", "false", "bias_correction='false' must be true or false"),
    ],
)
@pytest.mark.parametrize("how", ["by hand", "load_state_dict"])
def test_settings_set_later_are_checked_before_anything_changes(
    how: str, setting: str, value: Any, message: str
) -> None:
    (param,) = quadratic([1.0, 2.0])
    optimizer = ALTO([param])
    train(optimizer, [param], 1)
    before, saved = param.tolist(), optimizer.state_dict()
    if how == "by hand":
        optimizer.param_groups[0][setting] = value
    else:
        saved["param_groups"][0][setting] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved) if how == "load_state_dict" else optimizer.step()
    assert param.tolist() == before


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
    optimizer = ALTO([("used", used), ("dead", dead)])
    train(optimizer, [used], 3)
    assert set(optimizer.trust_ratios()) == {"used"}
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


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_not_know_its_layers_is_refused(copied: Any) -> None:
    """Inside megatron-core's optimizer nothing on a tensor says of which layer it is a range."""
    optimizer = ALTO(quadratic([1.0, 2.0]))
    optimizer._own.tell(optimizer.param_groups[0], Layout())
    with pytest.raises(TypeError, match=r"would not know which layers .* use state_dict\(\)"):
        copied(optimizer)


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


def test_hooks_may_change_a_state_dict_before_it_is_checked() -> None:
    (param,) = quadratic([1.0, 2.0, 3.0, 4.0])
    optimizer = ALTO([param])
    train(optimizer, [param], 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in STATES:
        saved["state"][0][key] = saved["state"][0][key].reshape(2, 2)

    def migrate(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        own = {k: v.flatten() if k in STATES else v for k, v in state_dict["state"][0].items()}
        return state_dict | {"state": {0: own}}

    optimizer.register_load_state_dict_pre_hook(migrate)
    optimizer.load_state_dict(saved)
    train(optimizer, [param], 1)


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


def test_superoffload_is_refused_at_the_first_gradient_and_at_step() -> None:
    """It runs on CUDA only, so its class is a stand-in; see tests/sharding for ZenFlow."""
    pytest.importorskip("deepspeed")
    params = quadratic([1.0], [2.0])
    optimizer = ALTO(params)
    for param in params:
        param._z3_optimizer = type("SuperOffloadOptimizer_Stage3", (), {})()  # type: ignore[attr-defined]
    assert len(optimizer.param_groups) == 1  # reading them raises nothing
    message = 'remove "super_offload" from "offload_optimizer"'
    with pytest.raises(RuntimeError, match=message):
        (params[1] * 2).sum().backward()
    with pytest.raises(RuntimeError, match=message):  # a second time, too
        (params[1] * 2).sum().backward()
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_arguments_that_step_does_not_know_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected argument 'grad_scaler'"):
        ALTO(quadratic([1.0])).step(grad_scaler=1)
