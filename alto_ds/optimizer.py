"""ALTO: a layer-wise optimizer that computes the same update however its layers are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from alto_ds import kernels, registration
from alto_ds.layout import Fragment, Layout, local, local_grad, resolve
from alto_ds.trust_ratio import TrustRatio, add_over_ranks, sums_dtype, trust_ratios

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
    owns; 8 where α is 0, which needs no s.

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
            RuntimeError: a gradient is sparse, no layout is known for a tensor, or ZenFlow calls.
                Raised before anything is changed.
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

        step_sizes, sums = [], []
        for shard in shards:
            state, tensor = self.state[shard.tensor], shard.tensor
            state[STEP] += 1
            sizes = _step_sizes(shard.group, state[STEP])
            shard_sums = torch.zeros(
                len(shard.layout.layers), 2, dtype=sums_dtype(tensor.device), device=tensor.device
            )
            for fragment in shard.layout.fragments:
                param, grad, exp_avg, exp_avg_sq = (
                    _view(x, fragment)
                    for x in (tensor, shard.grad, state[EXP_AVG], state[EXP_AVG_SQ])
                )
                exp_avg_grad = _view(state[EXP_AVG_GRAD], fragment) if sizes.alpha else None
                kernels.update_states(
                    param,
                    grad,
                    exp_avg_grad,
                    exp_avg,
                    exp_avg_sq,
                    sizes,
                    shard_sums[fragment.layer],
                )
            step_sizes.append(sizes)
            sums.append(shard_sums)

        layers = [layer for shard in shards for layer in shard.layout.layers]
        all_sums = torch.cat([x.to(sums[0].device) for x in sums])
        add_over_ranks(all_sums, layers)

        for shard, sizes, shard_sums in zip(
            shards, step_sizes, all_sums.split([len(x) for x in sums]), strict=True
        ):
            state, tensor = self.state[shard.tensor], shard.tensor
            shard_sums = shard_sums.to(tensor.device)
            ratios = self._ratios(shard.group, shard_sums)
            for fragment in shard.layout.fragments:
                kernels.apply_update(
                    _view(tensor, fragment),
                    _view(state[EXP_AVG], fragment),
                    _view(state[EXP_AVG_SQ], fragment),
                    sizes,
                    shard.group["lr"] * ratios[fragment.layer],
                )
            self._last[tensor] = (shard.layout, torch.column_stack([ratios, shard_sums.sqrt()]))
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
        return {
            names.get(layer.param, layer.name): TrustRatio(*row)
            for layout, table in self._last.values()
            for layer, row in zip(layout.layers, table.tolist(), strict=True)
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
        restore_state_dtype(self, state_dict, (EXP_AVG_GRAD, EXP_AVG, EXP_AVG_SQ))

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
        self._last: dict[Tensor, tuple[Layout, Tensor]] = {}  # [layers, 3]: TrustRatio

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

    def _make_states(self, shard: _Shard) -> None:
        state = self.state[shard.tensor]
        if not state:
            state[STEP] = 0
            if shard.group["alpha"]:
                state[EXP_AVG_GRAD] = zeros_for_state(shard.tensor)
            state[EXP_AVG] = zeros_for_state(shard.tensor)
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
        nonzero = nonzero[:, None].repeat(1, 2)
        add_over_ranks(nonzero, [shard.layout.layers[0] for shard in shards])
        return not nonzero.any()

    def _ratios(self, group: dict[str, Any], sums: Tensor) -> Tensor:
        """Trust ratios ``[layers]`` of one tensor's layers from their sums ``[layers, 2]``."""
        adapt = group["trust_ratio"]
        if adapt is None:
            adapt = group["weight_decay"] != 0
        if not adapt:
            return torch.ones_like(sums[:, 0])
        _, eps2, eps3 = _three_eps(group["eps"])
        clip = group["trust_clip"]
        return trust_ratios(sums, eps2, eps3, None if clip is None else (clip[0], clip[1]))


def grad_scaler_error(optimizer: str) -> RuntimeError:
    """What to raise where a GradScaler steps ``optimizer`` on layers that ranks share."""
    return RuntimeError(
        f"{optimizer} cannot be stepped by a torch.amp.GradScaler where ranks share layers: on an "
        "overflow in one rank's part that rank alone would skip the step, and the others would "
        'wait for it or go on without it. Use "bf16", or "fp16" with DeepSpeed\'s own loss '
        'scaling, in place of "torch_autocast" with dtype float16.'
    )


def zeros_for_state(tensor: Tensor) -> Tensor:
    """Zeros of the shape of ``tensor`` for an optimizer state: float32 at least."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)


def restore_state_dtype(
    optimizer: Optimizer, state_dict: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Load the states ``keys`` again, uncast, for parameters of less precision than float32.

    ``Optimizer.load_state_dict`` casts floating-point states to the parameter's dtype.
    """
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for saved_id, param in zip(saved_ids, params, strict=True):
        dtype = torch.promote_types(param.dtype, torch.float32)
        if dtype != param.dtype:
            saved = state_dict["state"].get(saved_id, {})
            for key in saved.keys() & keys:
                optimizer.state[param][key] = saved[key].to(param.device, dtype, copy=True)


def _view(tensor: Tensor, fragment: Fragment) -> Tensor:
    """The fragment's elements in ``tensor``, which is flat unless the fragment is all of it."""
    tensor = local(tensor)
    if fragment.length == tensor.numel():
        return tensor
    return tensor[fragment.offset : fragment.offset + fragment.length]


def _three_eps(eps: float | Sequence[float]) -> tuple[float, float, float]:
    return (eps, 0.0, 0.0) if isinstance(eps, (int, float)) else (eps[0], eps[1], eps[2])


def _step_sizes(group: dict[str, Any], step: int) -> kernels.StepSizes:
    beta1, beta2, beta3 = group["betas"]
    correct = group["bias_correction"]
    return kernels.StepSizes(
        alpha=group["alpha"],
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        correction2=1 - beta2**step if correct else 1.0,
        correction3=1 - beta3**step if correct else 1.0,
        eps=_three_eps(group["eps"])[0],
        weight_decay=group["weight_decay"],
    )


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
    if group["trust_ratio"] not in (None, True, False):
        raise ValueError(
            f"trust_ratio={group['trust_ratio']!r} must be true, false, or absent to adapt where "
            "weight_decay is not 0."
        )
