"""ALTO: a layer-wise optimizer that computes the same update however its layers are sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from alto_ds import nonfinite, registration, settings, states
from alto_ds.batches import Part, Plan, Shard, kinds_of, make_plan, name_of
from alto_ds.layout import (
    Layout,
    Names,
    OwnParameters,
    is_dtensor,
    local,
    local_grad,
    resolve,
)
from alto_ds.states import STEP
from alto_ds.step import take_step
from alto_ds.trust_ratio import TrustRatio


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
            the trust ratio or not. Without it they are scaled where ``weight_decay`` is not 0 at
            the first step, which is the rule of the authors' code; where it is 0 in every group
            all are scaled, and a warning says so.
        lr: learning rate.
        betas: (β1, β2, β3), decay of s, m and v.
        alpha: α with |α| < 1/(1−β1). −5 with β1 0.99 for global batches of about 1,000 samples
            and more; 0.5 with β1 0.01 for small ones; 0 is LAMB.
        eps: (ε1, ε2, ε3); a float is ε1 with ε2 = ε3 = 0, as in the authors' code.
        weight_decay: λ.
        bias_correction: False uses m and v as they are (Algorithm 1, "ALTO Vanilla").
        trust_clip: lowest and highest trust ratio, as ``min_coeff`` and ``max_coeff`` of
            DeepSpeed's LAMB; None for no bounds.
        state_dtype: "fp32", or "bf16" to keep s and m in bfloat16 by stochastic rounding. v is not
            rounded: its steps are too small for bfloat16.
        seed: chooses the random numbers of that rounding. They do not depend on the number of
            ranks or on how layers are cut, but for Megatron's tensor parallelism and DTensors cut
            along an inner dimension.
        nonfinite: what to do with NaN and infinity. "raise" never writes them to a weight or a
            state: what would become so is left as it was, and all ranks that share a layer raise
            together. On accelerators, which are not waited for, it is the next call that raises.
            "skip" looks at all gradients before anything changes, and skips the step on all these
            ranks where one is not finite; it costs one more pass over the gradients, 4 of about 48
            bytes a parameter, and waits for the device. ZeRO 1 to 3 have looked by themselves,
            unless "check_grad_overflow" is false; then they call ``step()`` for each parameter
            group, and each call decides for itself. "ignore" computes with them.

    Attributes:
        skipped_steps: number of calls of ``step()`` that "skip" has skipped in this process.

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
        nonfinite: str = "raise",
    ) -> None:
        registration.support_in_zero(type(self))
        self._forget()
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
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)
        registration.refuse_at_first_gradient("ALTO", self, self._own.names)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters, as :class:`torch.optim.Optimizer` does.

        Raises:
            ValueError: a setting is out of its bounds or misspelt, or a parameter is complex.
        """
        settings.check_keys(param_group)
        settings.check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        place = len(self.param_groups) - 1
        self._own.remember(place, self.param_groups[place])
        for param in self.param_groups[place]["params"]:
            if param.is_complex():
                self.param_groups.pop()
                self._own.groups.pop()
                raise ValueError(
                    f"ALTO: parameter {self._own.names[param]} is complex ({param.dtype}); pass "
                    "torch.view_as_real() of it instead."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **others: Any) -> Any:
        """Update every parameter that has a gradient.

        All ranks that share a layer of the parameter groups must call this together, also those
        that hold no part of it or have no gradient. Nothing is sent where no layer is shared, else
        one all-reduce per process group, of 16 bytes for each layer and 16 more.

        Args:
            closure: reevaluates the model and returns the loss.
            others: none; refused, for wrappers that pass more expect another optimizer.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            ValueError: a setting has been set out of its bounds.
            RuntimeError: a gradient is sparse, a state does not fit its parameter, no layout is
                known for a tensor, or a wrapper does what ALTO cannot. Raised before anything is
                changed.
            FloatingPointError: see ``nonfinite``; after a step, which the message describes.
        """
        registration.refuse_step_arguments("ALTO", others)
        self._watch.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings.check(group, wait_for_device=False)
        self._decide_what_is_scaled()
        parts = [Part(group, self._layout(group)) for group in self.param_groups]
        shards = self._shards(parts)
        if not any(part.layout.layers for part in parts) or self._only_makes_states(shards):
            return loss

        plan = self._plan(parts, shards)
        if not nonfinite.gradients_allow_step(plan, parts, shards):
            self.skipped_steps += 1
            return loss
        self._watch.note(take_step(plan, parts, shards))
        return loss

    def raise_nonfinite(self) -> None:
        """Raise what the latest call of :meth:`step` has found, again if it has raised it itself.

        On accelerators only the next call does. All ranks that share a layer must call this
        together, before they write a checkpoint. It waits for the device.

        Raises:
            FloatingPointError: names layers, step, ranks and where the bad numbers are.
        """
        self._watch.check_again()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: :class:`torch.amp.GradScaler`, which asks before each step, must unscale.

        Raises:
            RuntimeError: layers are shared, and each rank's GradScaler decides for itself.
        """
        for group in self.param_groups:
            for layer in self._layout(group).layers:
                # For DTensors PyTorch brings the scalers of all ranks to agree.
                if layer.groups and not is_dtensor(layer.param):
                    raise registration.grad_scaler_error("ALTO")
        return False

    def trust_ratios(
        self, named_parameters: Iterable[tuple[str, Tensor]] | None = None
    ) -> dict[str, TrustRatio]:
        """Return trust ratio, weight norm and update norm of each layer at the latest step.

        The result is the same on every rank and needs no communication. It waits for the device.
        Layers of which weights and update are 0 are left out; so are those without a gradient.

        Args:
            named_parameters: ``model.named_parameters()``, for names where the optimizer was made
                without them, as DeepSpeed makes it from a JSON. Without names a layer is called
                ``param_groups.G.I``, the I-th parameter of group G.
        """
        names = {} if named_parameters is None else {p: name for name, p in named_parameters}
        found = {}
        for group, plan, rows in self._last.values():
            scaled = group["trust_ratio"]
            numbers = torch.column_stack([plan.ratios[rows], plan.sums[rows].sqrt()]).tolist()
            for layer, (ratio, weight_norm, update_norm) in zip(
                plan.layers[rows], numbers, strict=True
            ):
                if weight_norm != 0 or update_norm != 0:
                    name = names.get(layer.param, layer.name)
                    found[name] = TrustRatio(ratio, weight_norm, update_norm, scaled)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; see :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: a setting is out of its bounds, or the groups are not this optimizer's.
            RuntimeError: a state has not the shape of its parameter. Nothing has been loaded then.
        """
        groups = self.param_groups
        super().load_state_dict(dict(state_dict))
        # torch puts new dicts in place of the groups. Schedulers, DeepSpeed and our own layouts
        # hold on to the old ones.
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.update(loaded | {"nonfinite": group["nonfinite"]})  # no matter of training
        self.param_groups = groups
        self._watch = nonfinite.Watch()
        states.restore_dtypes(self, state_dict, states.ALTO_STATES)
        self._plans.clear()  # states are checked when a plan is made

    def __getstate__(self) -> dict[str, Any]:
        if self._own.is_told:
            raise TypeError(
                "ALTO cannot be copied or pickled inside megatron-core's optimizer, for the copy "
                "would not know which layers are in its tensors; use state_dict()."
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_own" in self.__dict__:  # called by load_state_dict, after its hooks
            for group in state["param_groups"]:
                settings.check({**self.defaults, **group})
            states.check_loaded(state["state"], states.ALTO_STATES, self._own.names)
        super().__setstate__(state)
        if "_own" not in self.__dict__:  # unpickled
            self._forget()
            for place, group in enumerate(self.param_groups):
                group.setdefault("nonfinite", "raise")  # older versions had none
                self._own.remember(place, group)
            registration.refuse_at_first_gradient("ALTO", self, self._own.names)

    def _forget(self) -> None:
        self._own = OwnParameters()
        self._plans: dict[tuple[Layout, ...], Plan] = {}
        self._last: dict[Layout, tuple[dict[str, Any], Plan, slice]] = {}
        self._watch = nonfinite.Watch()
        self.skipped_steps = 0

    def _decide_what_is_scaled(self) -> None:
        """Set ``trust_ratio`` in the groups that do not say it, at the first step.

        Not earlier, for schedulers may set the weight decay when they are made; and not again, so
        that a weight decay that goes to 0 later changes nothing else.
        """
        undecided = [group for group, _ in self._own.groups if group["trust_ratio"] is None]
        trained = [
            group for group, params in self._own.groups if any(p.requires_grad for p in params)
        ]
        if undecided and settings.nothing_decays(trained):
            self.defaults["trust_ratio"] = True  # for groups that are added later
            registration.warn_on_rank_0(
                "ALTO: no parameter group has weight decay, so all layers are scaled by their "
                "trust ratios (Algorithm 2 of the paper), biases and norms too. Set weight_decay "
                "in the groups that decay, which leaves the others unscaled, or "
                '"trust_ratio": true or false in each group.'
                + registration.hint_at_placeholders(self._own.names)
            )
        for group in undecided:
            said = self.defaults["trust_ratio"]
            group["trust_ratio"] = bool(group["weight_decay"] != 0) if said is None else said

    def _layout(self, group: dict[str, Any]) -> Layout:
        """What the group's tensors hold now."""

        def find(tensors: Sequence[Tensor], params: Sequence[Tensor], names: Names) -> Layout:
            registration.refuse_other_updates("ALTO", self.param_groups, params)
            registration.refuse_swapping(group, params, names)
            return resolve(tensors, params, names)

        return self._own.layout(group, find)

    def _shards(self, parts: Sequence[Part]) -> list[Shard]:
        """The tensors to update in this call, with their states made."""
        found = []
        for part in parts:
            for place, tensor in enumerate(part.group["params"]):
                if tensor.grad is None:
                    continue
                if tensor.grad.is_sparse:
                    name = name_of(part.layout, place)
                    raise registration.gradient_error("ALTO", name, "sparse")
                found.append((part, place, tensor, local_grad(tensor)))
        shards = []
        for part, place, tensor, grad in found:
            state, group = self.state[tensor], part.group
            if not state:
                state.update(states.make(tensor, group["alpha"], group["state_dtype"]))
            own = (local(state.get(name)) for name in states.names(group["alpha"]))
            shards.append(Shard(tensor, state, (local(tensor), grad, *own), part, place))
        return shards

    def _only_makes_states(self, shards: Sequence[Shard]) -> bool:
        """Whether this is a wrapper's call that must not count as a step."""
        if not shards or not all(s.part.layout.master_copy and s.is_fresh() for s in shards):
            return False
        layers = [shard.part.layout.layers[shard.place] for shard in shards]
        return registration.is_dummy_step(layers, [shard.columns[1] for shard in shards])

    def _plan(self, parts: Sequence[Part], shards: Sequence[Shard]) -> Plan:
        """The plan made for such shards before, or a new one."""
        key = tuple(part.layout for part in parts)
        kinds = kinds_of(shards)
        plan = self._plans.get(key)
        if plan is None or kinds is None or plan.kinds != kinds:
            for shard in shards:
                group, layout = shard.part
                name = functools.partial(name_of, layout, shard.place)
                states.check(shard.columns, shard.state, name, group["alpha"], group["state_dtype"])
                shard.state[STEP] = int(shard.state[STEP])  # some checkpoints make it a tensor
            plan = self._plans[key] = make_plan(parts, shards)
        for part, rows in zip(parts, plan.rows, strict=True):
            self._last[part.layout] = (part.group, plan, rows)
        return plan
