"""ALTO: a layer-wise optimizer that computes the same update however its layers are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from alto_ds import kernels, registration
from alto_ds.layout import Layer, Layout, local, local_grad, resolve
from alto_ds.trust_ratio import (
    TrustRatio,
    add_over_ranks,
    rows_to_add,
    sums_dtype,
    trust_ratios,
)

STEP = "step"
EXP_AVG_GRAD = "exp_avg_grad"  # s, average of the gradient; absent where alpha is 0
EXP_AVG = "exp_avg"  # m, average of the corrected gradient
EXP_AVG_SQ = "exp_avg_sq"  # v, average of its square


class _Shard(NamedTuple):
    """A tensor that this call of ``step()`` updates, with this rank's part of its gradient."""

    tensor: Tensor
    grad: Tensor
    group: dict[str, Any]
    layout: Layout


class _Members(NamedTuple):
    """Which shards of a call form one batch."""

    indices: list[int]
    rows: slice  # of their layers in the plan's sums
    fragments: kernels.FragmentTable


class _Plan(NamedTuple):
    """All that stays the same while ``step()`` is called for the same tensors."""

    kinds: list[Any]  # see ALTO._kind; the plan is good for shards of these kinds
    members: list[_Members]
    layers_of: dict[Tensor, list[tuple[int, Layer]]]  # each with its row
    rows_of: dict[ProcessGroup, Tensor]  # rows to add up over the ranks of each group
    sums: Tensor  # [layers, 2]: Σθ² and Σr² of the latest step
    ratios: Tensor  # [layers]


class ALTO(Optimizer):
    r"""ALTO (Zhao et al., NeurIPS 2025, arXiv 2510.27153, Algorithm 2); LAMB where ``alpha`` is 0.

    For each layer θ with gradient g, at its step k:

    .. code-block:: text

        h = g + α (1−β1)(g − s)                 s ← s + (1−β1)(g − s)
        m ← β2 m + (1−β2) h                     v ← β3 v + (1−β3) h²
        r = m̂ / (√v̂ + ε1) + λθ                  m̂ = m / (1−β2^k),  v̂ = v / (1−β3^k)
        θ ← θ − lr · r · φ(‖θ‖) / (‖r‖ + ε2 φ(‖θ‖)),   φ(x) = x + ε3

    With ``c = −α(1−β1)`` the first line reads ``h = (1−c) g + c s``: for negative α ALTO follows a
    mix of the fresh gradient and its average over about 1/(1−β1) steps, for positive α it steps
    away from that average.

    The norms are those of whole layers, also where DeepSpeed's ZeRO cut them: see
    :mod:`alto_ds.layout`. States are float32 (float64 for float64 parameters): ``exp_avg_grad``
    (s), ``exp_avg`` (m) and ``exp_avg_sq`` (v), 12 bytes for each float32 parameter that this rank
    owns; 8 where α is 0, which needs no s, or with ``state_dtype="bf16"``.

    Args:
        params: parameters, groups of parameters, or named parameters. Groups may set any of the
            arguments below, and ``trust_ratio``: True or False to scale the group's updates by
            the trust ratio or not. Without it they are scaled where ``weight_decay`` is not 0,
            which is the rule of the authors' code.
        lr: learning rate.
        betas: (β1, β2, β3), decay of s, m and v.
        alpha: α with |α| < 1/(1−β1). −5 with β1 0.99 for global batches of about 1,000 samples
            and more; 0.5 with β1 0.01 for small ones; 0 is LAMB.
        eps: (ε1, ε2, ε3); a float is ε1 with ε2 = ε3 = 0, as in the authors' code.
        weight_decay: λ.
        bias_correction: False uses m and v as they are (Algorithm 1, "ALTO Vanilla").
        trust_clip: lowest and highest trust ratio, as ``min_coeff`` and ``max_coeff`` of
            DeepSpeed's LAMB; None for no bounds.
        state_dtype: "fp32", or "bf16" to keep s and m in bfloat16, rounded up or down by chance so
            that the mean is right. v is not rounded: its steps are too small for bfloat16.
        seed: chooses the random numbers of that rounding. They do not depend on the number of
            ranks or on how layers are cut.

    Raises:
        ValueError: a setting is out of its bounds.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: Sequence[float] = (0.99, 0.9, 0.99),
        alpha: float = -5.0,
        eps: float | Sequence[float] = (1e-6, 1e-6, 1e-10),
        weight_decay: float = 1e-4,
        bias_correction: bool = True,
        trust_clip: Sequence[float] | None = None,
        state_dtype: str = "fp32",
        seed: int = 0,
    ) -> None:
        registration.support_in_zero(type(self))
        self._forget_layouts()
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "trust_clip": trust_clip,
            "trust_ratio": None,
            "state_dtype": state_dtype,
            "seed": seed,
        }
        super().__init__(params, defaults)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups; wrappers put their own tensors in them."""
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        registration.refuse_other_updates("ALTO", groups, self._names)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters, as :class:`torch.optim.Optimizer` does.

        Raises:
            ValueError: a setting is out of its bounds, or a parameter is complex.
        """
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        params = list(group["params"])
        place = len(self.param_groups) - 1
        names = group.get("param_names") or [
            f"param_groups.{place}.{i}" for i in range(len(params))
        ]
        for name, param in zip(names, params, strict=True):
            if param.is_complex():
                del self.param_groups[-1]
                raise ValueError(
                    f"ALTO: parameter {name} is complex ({param.dtype}); pass torch.view_as_real() "
                    "of it instead."
                )
        self._names.update(zip(params, names, strict=True))
        self._model_params.append((group, params))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, step_id: int | None = None) -> Any:
        """Update every parameter that has a gradient.

        All ranks that share a layer must call this together. Nothing is sent where no layer is
        shared, else one all-reduce per process group, of 16 bytes for each layer.

        Args:
            closure: reevaluates the model and returns the loss.
            step_id: passed by DeepSpeed's ZenFlow alone, which is refused.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: a gradient is sparse, no layout is known for a tensor, the states' dtype
                fits no offload to NVMe, or ZenFlow calls. Raised before anything is changed.
        """
        if step_id is not None:
            raise registration.zenflow_error("ALTO")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shards = self._shards()
        if not shards or self._only_allocates(shards):
            return loss

        plan = self._plan(shards)
        passes = []
        for members in plan.members:
            group, first = shards[members.indices[0]].group, shards[members.indices[0]].tensor
            sizes = _step_sizes(group, self.state[first][STEP] + 1)
            batch = self._batch([shards[i] for i in members.indices], members.fragments)
            passes.append((kernels.choose(batch), batch, sizes, members.rows))
        for shard in shards:
            self.state[shard.tensor][STEP] += 1
            self._last[shard.tensor] = plan

        plan.sums.zero_()
        for kernel, batch, sizes, rows in passes:
            sums = plan.sums[rows]
            on_device = sums.to(batch.params[0].device)
            kernel.update_states(batch, sizes, on_device)
            if on_device is not sums:
                sums.copy_(on_device)
        add_over_ranks(plan.sums, plan.rows_of)
        for kernel, batch, sizes, rows in passes:
            sums = plan.sums[rows].to(batch.params[0].device)
            ratios = _ratios(sums, sizes)
            kernel.apply_update(batch, sizes, sizes.lr * ratios)
            plan.ratios[rows] = ratios
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: :class:`torch.amp.GradScaler`, which asks before each step, shall unscale.

        Raises:
            RuntimeError: layers are shared, and each rank's GradScaler decides for itself.
        """
        self._resolve_layouts()
        for tensor, layout in self._layouts.items():
            # For DTensors PyTorch brings the scalers of all ranks to agree.
            if any(layer.groups for layer in layout.layers) and not hasattr(tensor, "device_mesh"):
                raise grad_scaler_error("ALTO")
        return False

    def trust_ratios(
        self, named_parameters: Iterable[tuple[str, Tensor]] | None = None
    ) -> dict[str, TrustRatio]:
        """Return trust ratio, weight norm and update norm of each layer at its latest update.

        The result is the same on every rank and needs no communication. It waits for the device.

        Args:
            named_parameters: ``model.named_parameters()``, for names where the optimizer was made
                without them, as DeepSpeed makes it from a JSON. Without names a layer is called
                ``param_groups.G.I``, the I-th parameter of group G.
        """
        names = {} if named_parameters is None else {p: name for name, p in named_parameters}
        tables = {
            id(plan): torch.column_stack([plan.ratios, plan.sums.sqrt()]).tolist()
            for plan in self._last.values()
        }
        return {
            names.get(layer.param, layer.name): TrustRatio(*tables[id(plan)][row])
            for tensor, plan in self._last.items()
            for row, layer in plan.layers_of[tensor]
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; see :class:`torch.optim.Optimizer`."""
        groups = self.param_groups
        super().load_state_dict(dict(state_dict))
        # torch puts new dicts in place of the groups. Schedulers, DeepSpeed and our own layouts
        # hold on to the old ones.
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.update(loaded)
        self.param_groups = groups
        dtypes = {EXP_AVG_GRAD: "state_dtype", EXP_AVG: "state_dtype", EXP_AVG_SQ: ""}
        restore_state_dtype(self, state_dict, dtypes)
        self._plans.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layouts" not in self.__dict__:  # unpickled, not loaded
            self._forget_layouts()
            groups, self.param_groups = self.param_groups, []
            for group in groups:
                self.add_param_group(group)

    def _forget_layouts(self) -> None:
        # The model's own parameters of each group. Wrappers replace them in the group.
        self._model_params: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._names: dict[Tensor, str] = {}
        self._layouts: dict[Tensor, Layout] = {}
        self._plans: dict[Tensor, _Plan] = {}  # by the first tensor of the call
        self._last: dict[Tensor, _Plan] = {}  # that of each tensor's latest step

    def _shards(self) -> list[_Shard]:
        """The tensors to update in this call, checked and with their states made."""
        self._resolve_layouts()
        shards = []
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                layout = self._layouts[tensor]
                if tensor.grad.is_sparse:
                    raise RuntimeError(
                        f"ALTO: the gradient of {layout.layers[0].name} is sparse; make its module "
                        "with sparse=False."
                    )
                if layout.fp32_states and group["state_dtype"] != "fp32":
                    raise RuntimeError(
                        f'ALTO: "state_dtype": "{group["state_dtype"]}" cannot be used with '
                        "offload to NVMe, where DeepSpeed keeps all states in float32; write "
                        '"fp32", or "device": "cpu" under "offload_optimizer".'
                    )
                shards.append(_Shard(tensor, local_grad(tensor), group, layout))
        for shard in shards:
            self._make_states(shard)
        return shards

    def _resolve_layouts(self) -> None:
        """Find the layouts of tensors that have none yet."""
        for group in self.param_groups:
            tensors = group["params"]
            if any(tensor not in self._layouts for tensor in tensors):
                layouts = resolve(tensors, self._params_of(group), self._names)
                self._layouts.update(zip(tensors, layouts, strict=True))

    def _params_of(self, group: dict[str, Any]) -> list[Tensor]:
        for known, params in self._model_params:
            if known is group:
                return params
        return list(self._names)

    def _plan(self, shards: Sequence[_Shard]) -> _Plan:
        """The plan made for such shards before, or a new one."""
        first_step = self.state[shards[0].tensor][STEP]
        kinds = [self._kind(shard, first_step) for shard in shards]
        plan = self._plans.get(shards[0].tensor)
        if plan is None or plan.kinds != kinds:
            indices_of: dict[Any, list[int]] = {}
            for index, (_, *kind) in enumerate(kinds):
                indices_of.setdefault(tuple(kind), []).append(index)
            plan = _make_plan(shards, kinds, list(indices_of.values()))
            self._plans[shards[0].tensor] = plan
        return plan

    def _kind(self, shard: _Shard, first_step: int) -> tuple[Any, ...]:
        """The tensor, and what tensors of one batch have in common."""
        state, tensor = self.state[shard.tensor], shard.tensor
        return (
            *(id(tensor), id(shard.group), state[STEP] - first_step),
            *(tensor.device, tensor.dtype, shard.grad.dtype),
            *(state[EXP_AVG].dtype, state[EXP_AVG_SQ].dtype),
        )

    def _batch(self, shards: Sequence[_Shard], fragments: kernels.FragmentTable) -> kernels.Batch:
        states = [self.state[shard.tensor] for shard in shards]
        return kernels.Batch(
            params=[local(shard.tensor) for shard in shards],
            grads=[shard.grad for shard in shards],
            exp_avg_grads=[local(s[EXP_AVG_GRAD]) for s in states if shards[0].group["alpha"]],
            exp_avgs=[local(state[EXP_AVG]) for state in states],
            exp_avg_sqs=[local(state[EXP_AVG_SQ]) for state in states],
            fragments=fragments,
        )

    def _make_states(self, shard: _Shard) -> None:
        state = self.state[shard.tensor]
        if not state:
            state[STEP] = 0
            if shard.group["alpha"]:
                state[EXP_AVG_GRAD] = zeros_for_state(shard.tensor, shard.group["state_dtype"])
            state[EXP_AVG] = zeros_for_state(shard.tensor, shard.group["state_dtype"])
            state[EXP_AVG_SQ] = zeros_for_state(shard.tensor)
        elif shard.group["alpha"] and EXP_AVG_GRAD not in state:
            raise RuntimeError(
                f"ALTO: alpha={shard.group['alpha']} needs the state {EXP_AVG_GRAD}, and the "
                "states that were loaded lack it: a run with alpha=0 does not keep it, and "
                "DeepSpeed's universal checkpoints drop it. Go on with alpha=0, load an ordinary "
                "checkpoint, or start without loaded states."
            )

    def _only_allocates(self, shards: Sequence[_Shard]) -> bool:
        """Whether a wrapper calls ``step()`` just to have the states made.

        DeepSpeed's FP16_UnfusedOptimizer does so, with gradients of zeros. Such a call must not
        count as a step, nor decay the weights.
        """
        if not all(s.layout.master_copy and self.state[s.tensor][STEP] == 0 for s in shards):
            return False
        # All ranks that share a layer must decide alike.
        used = [float(shard.grad.any()) for shard in shards]
        nonzero = torch.tensor(used, device=shards[0].grad.device)
        add_over_ranks(nonzero, rows_to_add([shard.layout.layers[0] for shard in shards]))
        return not nonzero.any()


def _make_plan(shards: Sequence[_Shard], kinds: list[Any], batches: Sequence[list[int]]) -> _Plan:
    members = []
    layers: list[Layer] = []
    layers_of = {}
    for indices in batches:
        first = len(layers)
        for index in indices:
            tensor, _, _, layout = shards[index]
            layers_of[tensor] = list(enumerate(layout.layers, start=len(layers)))
            layers += layout.layers
        table = kernels.FragmentTable([shards[index].layout for index in indices])
        members.append(_Members(indices, slice(first, len(layers)), table))
    device = shards[batches[0][0]].grad.device
    sums = torch.zeros(len(layers), 2, dtype=sums_dtype(device), device=device)
    return _Plan(kinds, members, layers_of, rows_to_add(layers), sums, torch.ones_like(sums[:, 0]))


def _ratios(sums: Tensor, sizes: kernels.StepSizes) -> Tensor:
    """Trust ratios ``[layers]`` from sums ``[layers, 2]``, 1 where layers are not adapted."""
    if not sizes.adapt:
        return torch.ones_like(sums[:, 0])
    return trust_ratios(sums, sizes.eps[1], sizes.eps[2], sizes.trust_clip)


def grad_scaler_error(optimizer: str) -> RuntimeError:
    """What to raise where a GradScaler steps ``optimizer`` on layers that ranks share."""
    return RuntimeError(
        f"{optimizer} cannot be stepped by a torch.amp.GradScaler where ranks share layers: on an "
        "overflow in one rank's part that rank alone would skip the step, and the others would "
        'wait for it or go on without it. Use "bf16", or "fp16" with DeepSpeed\'s own loss '
        'scaling, in place of "torch_autocast" with dtype float16.'
    )


def zeros_for_state(tensor: Tensor, state_dtype: str = "fp32") -> Tensor:
    """Zeros of the shape of ``tensor`` for an optimizer state, of at least float32 if "fp32"."""
    dtype = _state_dtype(tensor, state_dtype)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)


def _state_dtype(param: Tensor, state_dtype: str) -> torch.dtype:
    if state_dtype == "bf16":
        return torch.bfloat16
    return torch.promote_types(param.dtype, torch.float32)


def restore_state_dtype(
    optimizer: Optimizer, state_dict: Mapping[str, Any], dtypes: Mapping[str, str]
) -> None:
    """Load states again where ``Optimizer.load_state_dict`` has cast them to a wrong dtype.

    It casts floating-point states to the parameter's dtype.

    Args:
        optimizer: what ``state_dict`` has been loaded into.
        state_dict: as ``optimizer.state_dict()`` returned it.
        dtypes: the states to see to, each with the key of its "fp32" or "bf16" in the parameter
            groups, or "" for those that are always float32.
    """
    saved_groups = state_dict["param_groups"]
    for saved_group, group in zip(saved_groups, optimizer.param_groups, strict=True):
        for saved_id, param in zip(saved_group["params"], group["params"], strict=True):
            saved = state_dict["state"].get(saved_id, {})
            for key in saved.keys() & dtypes.keys():
                dtype = _state_dtype(param, group[dtypes[key]] if dtypes[key] else "fp32")
                if dtype != param.dtype:
                    optimizer.state[param][key] = saved[key].to(param.device, dtype, copy=True)


def _three_eps(eps: float | Sequence[float]) -> tuple[float, float, float]:
    eps1, eps2, eps3 = (eps, 0.0, 0.0) if isinstance(eps, (int, float)) else eps
    return float(eps1), float(eps2), float(eps3)


def _step_sizes(group: dict[str, Any], step: int) -> kernels.StepSizes:
    beta1, beta2, beta3 = map(float, group["betas"])
    correct = group["bias_correction"]
    adapt, clip = group["trust_ratio"], group["trust_clip"]
    return kernels.StepSizes(
        alpha=float(group["alpha"]),
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        correction2=1 - beta2**step if correct else 1.0,
        correction3=1 - beta3**step if correct else 1.0,
        eps=_three_eps(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        lr=group["lr"],
        adapt=group["weight_decay"] != 0 if adapt is None else adapt,
        trust_clip=None if clip is None else (float(clip[0]), float(clip[1])),
        noise_key=_noise_key(group["seed"], step),
    )


def _noise_key(seed: int, step: int) -> int:
    """32 random bits for each step, by the mixing function of SplitMix64."""
    bits = 2**64 - 1
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) & bits
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & bits
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & bits
    return x >> 32


def check_alpha(alpha: float, beta: float, beta_name: str) -> None:
    """Raise ValueError unless 0 <= beta < 1 and |alpha| < 1 / (1 − beta)."""
    if not 0 <= beta < 1:
        raise ValueError(f"{beta_name}={beta} is out of bounds; use 0 <= {beta_name} < 1.")
    if not abs(alpha) * (1 - beta) < 1:
        needed = f"{beta_name} above {1 - 1 / abs(alpha):g}" if math.isfinite(alpha) else "0"
        raise ValueError(
            f"alpha={alpha} is out of bounds: with {beta_name}={beta}, |alpha| must be below "
            f"1 / (1 - {beta_name}) = {1 / (1 - beta):g}; use a smaller |alpha|, or {needed}."
        )


def _check_settings(group: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first setting of ``group`` that is out of bounds."""
    betas, eps, clip = group["betas"], group["eps"], group["trust_clip"]
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 3:
        raise ValueError(
            f"betas={betas!r} must be three numbers (beta1, beta2, beta3): the decay of the "
            "gradient's average, of the first and of the second moment, such as (0.99, 0.9, 0.99). "
            "Leave betas out for these; Hugging Face Trainer's \"auto\" means Adam's two."
        )
    for name, values in (
        *((name, [group[name]]) for name in ("lr", "alpha", "weight_decay")),
        ("betas", betas),
        ("eps", eps if isinstance(eps, Sequence) else [eps]),
        ("trust_clip", clip if isinstance(clip, Sequence) else [] if clip is None else [clip]),
    ):
        if not all(isinstance(value, (int, float, Tensor)) for value in values):
            raise ValueError(f"{name}={group[name]!r} must be made of numbers.")
    for name, value in (("lr", group["lr"]), ("weight_decay", group["weight_decay"])):
        if not value >= 0:
            raise ValueError(f"{name}={value!r} is out of bounds; use a number {name} >= 0.")
    for i, beta in enumerate(betas):
        check_alpha(group["alpha"] if i == 0 else 0.0, beta, f"betas[{i}]")
    if not isinstance(eps, (int, float)) and len(eps) != 3:
        raise ValueError(
            f"eps={eps!r} must be three numbers (eps1, eps2, eps3), such as (1e-6, 1e-6, 1e-10), "
            "or one number for eps1 with eps2 = eps3 = 0."
        )
    if not all(value >= 0 for value in _three_eps(eps)):
        raise ValueError(f"eps={eps} is out of bounds; use values eps >= 0.")
    is_pair = isinstance(clip, Sequence) and len(clip) == 2 and 0 <= clip[0] <= clip[1]
    if clip is not None and not is_pair:
        raise ValueError(
            f"trust_clip={clip!r} must be (low, high) with 0 <= low <= high, such as (0.01, 10), "
            "or None."
        )
    if group["state_dtype"] not in ("fp32", "bf16"):
        raise ValueError(
            f'state_dtype={group["state_dtype"]!r} must be "fp32", or "bf16" for less memory.'
        )
    if not isinstance(group["seed"], int):
        raise ValueError(f"seed={group['seed']!r} must be a whole number.")
    if group["trust_ratio"] not in (None, True, False):
        raise ValueError(
            f"trust_ratio={group['trust_ratio']!r} must be true, false, or absent to adapt where "
            "weight_decay is not 0."
        )
