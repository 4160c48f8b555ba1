"""E: the gradient correction of ALTO in front of any optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from alto_ds import nonfinite, registration, states
from alto_ds.layout import (
    Fragment,
    Layer,
    Layout,
    Names,
    OwnParameters,
    local,
    resolve,
    tensor_parallel,
    whole,
)
from alto_ds.optimizer import ALTO
from alto_ds.settings import check_alpha, check_nonfinite
from alto_ds.states import E_EXP_AVG_GRAD

# Base optimizers that treat each element by itself, and so do not mind how tensors are cut.
_ELEMENTWISE = {
    "torch.optim": (
        *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD"),
    ),
    "deepspeed.ops": (
        *("DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLion"),
    ),
}


class E(Optimizer):
    r"""Correct each gradient before ``optimizer`` uses it (Zhao et al., arXiv 2510.27153).

    .. code-block:: text

        g' = g + α a,   a = (1−β)(g − s),   s ← s + a

    where s is the moving average of the gradient; a is the paper's exploration average
    ``a_k = β a_{k-1} + (1−β)(g_k − g_{k-1})``. The corrected gradient is left in ``param.grad``,
    as gradient clipping does.

    The one state per parameter, s, is kept beside the base optimizer's states, as
    ``optimizer.state[param]["e_exp_avg_grad"]``, and so is saved and restored with them.
    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own.

    The correction is elementwise, so it is exact however tensors are sharded. The base optimizer
    must be elementwise too where ZeRO or tensor parallelism cuts parameters, or ALTO, which knows
    what was cut; a wrong one is refused at the first step. On whole parameters any base will do,
    and on DTensors PyTorch computes as on whole ones, or refuses.

    Args:
        optimizer: the base optimizer, any :class:`torch.optim.Optimizer` that does not itself call
            the closure several times.
        alpha: α with |α| < 1/(1−β). Negative values mix in the average of past gradients.
        beta: β, decay of that average.
        elementwise: True or False: whether the base optimizer treats each element by itself.
            Without it that is known of the optimizers of PyTorch and DeepSpeed.
        nonfinite: what to do with NaN and infinity in gradients and in s, which are looked at
            before anything changes: 8 of about 64 bytes a parameter, one all-reduce of 4 bytes
            where ranks share parameters, and the device is waited for. "raise" raises on all these
            ranks; "skip" skips the step on all of them where a gradient is not finite; "ignore"
            does not look. What the base optimizer makes of its own states is its own affair.

    Attributes:
        skipped_steps: number of calls of ``step()`` that "skip" has skipped in this process.

    Raises:
        ValueError: a setting is out of its bounds.
        TypeError: ``optimizer`` is no optimizer, or one that cannot be adapted.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        alpha: float = -5.0,
        beta: float = 0.99,
        elementwise: bool | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"E: optimizer={optimizer!r} must be a torch.optim.Optimizer that has been made, "
                "such as E(torch.optim.AdamW(model.parameters()), alpha=-5, beta=0.99)."
            )
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                "E: LBFGS evaluates the model several times in one step, with gradients that no "
                "correction can reach; use another base optimizer."
            )
        if isinstance(optimizer, E):
            raise TypeError("E: the base optimizer is an E already; correct gradients once.")
        check_alpha(alpha, beta, "beta")
        check_nonfinite(nonfinite)
        if not isinstance(elementwise, bool | None):
            raise ValueError(f"elementwise={elementwise!r} must be true, false or absent.")
        registration.support_in_zero(type(self))
        if elementwise is None:
            elementwise = isinstance(optimizer, ALTO) or _is_elementwise(optimizer)
        # The base class would make param_groups of its own; __setstate__ makes all the rest.
        self.__setstate__(
            {
                "optimizer": optimizer,
                "alpha": alpha,
                "beta": beta,
                "elementwise": elementwise,
                "nonfinite": nonfinite,
                "_makes_states_early": bool(optimizer.state),
            }
        )
        registration.refuse_at_first_gradient("E", self, self._own.names)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups; DeepSpeed swaps them before each step."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's states, with ``e_exp_avg_grad`` beside them."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's default settings."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "alpha", "beta", "elementwise", "nonfinite", "_makes_states_early")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer: Optimizer = state["optimizer"]
        self.alpha: float = state["alpha"]
        self.beta: float = state["beta"]
        self.elementwise: bool = state["elementwise"]
        self.nonfinite: str = state.get("nonfinite", "raise")  # older versions had none
        self._makes_states_early: bool = state["_makes_states_early"]
        self.skipped_steps = 0
        self._own = OwnParameters()
        for place, group in enumerate(self.optimizer.param_groups):
            self._own.remember(place, group)
        self._checked: set[Tensor] = set()
        super().__setstate__({})

    def __repr__(self) -> str:
        return f"E(alpha={self.alpha}, beta={self.beta}, optimizer={self.optimizer!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.optimizer.add_param_group(param_group)
        self._own.remember(len(self.param_groups) - 1, self.param_groups[-1])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, in which ``e_exp_avg_grad`` is included."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            RuntimeError: a state has not the shape of its parameter. Nothing has been loaded then.
        """
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            saved = [state_dict["state"].get(key, {}) for key in saved_group["params"]]
            loaded = dict(zip(group["params"], saved, strict=False))
            states.check_loaded(loaded, (E_EXP_AVG_GRAD,), {t: self._name(t) for t in loaded})
        self.optimizer.load_state_dict(dict(state_dict))
        states.restore_dtypes(self.optimizer, state_dict, (E_EXP_AVG_GRAD,))

    # state_dict and load_state_dict are the base optimizer's, and so are their hooks.

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook with the base optimizer."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook with the base optimizer."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """Register the hook with the base optimizer."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """Register the hook with the base optimizer."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **others: Any) -> Any:
        """Correct all gradients, then take the base optimizer's step.

        Args:
            closure: reevaluates the model and returns the loss; called once, before the step.
            others: none; refused, for wrappers that pass more expect another optimizer.

        Returns:
            What ``closure`` returned, else what the base optimizer's ``step`` returns.

        Raises:
            ValueError: α or β has been set out of its bounds.
            RuntimeError: a gradient is sparse or complex, a state does not fit its parameter,
                parameters are cut and the base optimizer is not elementwise, or a wrapper does
                what E cannot. Raised before anything is changed.
            FloatingPointError: see ``nonfinite``; likewise.
        """
        registration.refuse_step_arguments("E", others)
        check_alpha(self.alpha, self.beta, "beta")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param in params:
            if param.grad.is_sparse or param.grad.is_complex():
                kind = "sparse" if param.grad.is_sparse else "complex"
                raise registration.gradient_error("E", self._name(param), kind)
            average = self._average(param)
            if average is not None and average.shape != param.shape:
                raise states.shape_error(E_EXP_AVG_GRAD, self._name(param), average, param)
        self._check_base()
        if self.nonfinite != "ignore" and not self._may_step():
            self.skipped_steps += 1
            return loss
        averages = [self._correct(param) for param in params]
        base_loss = self.optimizer.step()
        # Kept only now: base optimizers make their own states where state[param] is empty.
        for param, average in zip(params, averages, strict=True):
            self.state[param].setdefault(E_EXP_AVG_GRAD, average)
        return base_loss if closure is None else loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: :class:`torch.amp.GradScaler` must unscale before gradients are corrected.

        Raises:
            RuntimeError: layers are shared, and each rank's GradScaler decides for itself.
        """
        if isinstance(self.optimizer, ALTO):
            return self.optimizer._step_supports_amp_scaling
        if _are_cut(self._tensors(), self._own.names):
            raise registration.grad_scaler_error("E")
        return False

    def _tensors(self) -> list[Tensor]:
        return [tensor for group in self.param_groups for tensor in group["params"]]

    def _check_base(self) -> None:
        """See that the base optimizer fits the tensors that are in its groups now."""
        tensors = self._tensors()
        if self._checked.issuperset(tensors):
            return
        registration.refuse_other_updates("E", self.param_groups, self._own.names)
        if not self.elementwise and _are_cut(tensors, self._own.names):
            name = type(self.optimizer).__name__
            raise RuntimeError(
                f"E: the base optimizer {name} is not known to treat each element by itself, and "
                "ZeRO or tensor parallelism has cut the parameters: what it computes of a whole "
                "matrix would be wrong. Use an elementwise one such as AdamW, use ZeRO stage 0, or "
                f"write E({name}(...), elementwise=True) if it is elementwise."
            )
        self._make_missing_states(tensors)
        self._checked.update(tensors)

    def _make_missing_states(self, tensors: Sequence[Tensor]) -> None:
        """Make the states of ``tensors`` that the base optimizer made of the model's parameters.

        Adagrad makes its states when it is made, and ZeRO's tensors are not there then.
        """
        missing = [tensor for tensor in tensors if tensor not in self.state]
        if not (self._makes_states_early and missing):
            return
        groups = [dict(group) for group in self.param_groups]
        fresh = type(self.optimizer)(groups, **self.defaults)
        for tensor in missing:
            self.state[tensor].update(fresh.state[tensor])
        for param in self._own.names.keys() - set(tensors):
            self.state.pop(param, None)

    def _may_step(self) -> bool:
        """Whether all gradients and averages are finite on all ranks that share a parameter.

        Only layers are looked at, for padding may hold anything.

        Raises:
            FloatingPointError: one is not, and the step is not to be skipped.
        """
        looked_at = []
        groups: dict[ProcessGroup, None] = {}
        for group in self.param_groups:
            layout = self._own.layout(group, _known_layout)
            groups |= dict.fromkeys(g for layer in layout.layers for g in layer.groups)
            for f in layout.fragments:
                param = group["params"][f.tensor]
                columns = {"gradient": param.grad, f"state {E_EXP_AVG_GRAD}": self._average(param)}
                for where, tensor in columns.items():
                    if tensor is not None and param.grad is not None:
                        part = local(tensor).reshape(-1)[f.offset : f.offset + f.length]
                        name, step = layout.layers[f.layer].name, self.state.get(param, {})
                        looked_at.append((part, name, where, int(step.get("step", 0)) + 1))
        device = next((part.device for part, *_ in looked_at), torch.device("cpu"))
        bad, asking = nonfinite.ask((part for part, *_ in looked_at), groups, device)
        if not bad:
            return True
        findings = nonfinite.gather(
            [
                nonfinite.Finding(name, where, nonfinite.this_rank(), step)
                for part, name, where, step in looked_at
                if not nonfinite.is_finite(part)
            ],
            asking,
        )
        if self.nonfinite == "skip" and all(f.where == "gradient" for f in findings):
            return False
        found = "; ".join(f"{f.layer} in its {f.where} (rank {f.rank})" for f in findings[:4])
        raise FloatingPointError(
            f"E: step {findings[0].step}: not finite: {found}. Nothing has been changed. Go on "
            'from the latest checkpoint; "nonfinite": "skip" skips steps whose gradients are not '
            "finite."
        )

    def _average(self, param: Tensor) -> Tensor | None:
        # Not self.state[param], which would make the empty entry.
        return self.state.get(param, {}).get(E_EXP_AVG_GRAD)

    def _correct(self, param: Tensor) -> Tensor:
        """Replace ``param.grad`` by g', advance s and return it."""
        assert param.grad is not None
        average = self._average(param)
        if average is None:
            average = states.zeros(E_EXP_AVG_GRAD, param)
        difference = param.grad - average
        param.grad.add_(difference, alpha=self.alpha * (1 - self.beta))
        average.add_(difference, alpha=1 - self.beta)
        return average

    def _name(self, param: Tensor) -> str:
        for place, group in enumerate(self.param_groups):
            for i, candidate in enumerate(group["params"]):
                if candidate is param:
                    return group.get("param_names", {i: f"param_groups.{place}.{i}"})[i]
        raise AssertionError("the parameter is in no group")


def _known_layout(tensors: Sequence[Tensor], params: Sequence[Tensor], names: Names) -> Layout:
    """The layout of a group's tensors; where no framework knows them, each is taken as whole."""
    try:
        return resolve(tensors, params, names)
    except RuntimeError:
        layers = tuple(Layer(t, names.get(t, "a wrapper's tensor")) for t in tensors)
        parts = enumerate(local(tensor).numel() for tensor in tensors)
        return Layout(layers, tuple(Fragment(i, 0, n, 0, i, whole=True) for i, n in parts))


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Whether the class itself, no subclass of it, is known to be."""
    kind = type(optimizer)
    return any(
        kind.__module__.startswith(module) and kind.__name__ in names
        for module, names in _ELEMENTWISE.items()
    )


def _are_cut(tensors: Sequence[Tensor], params: Iterable[Tensor]) -> bool:
    """Whether any of ``tensors`` is not one whole parameter."""
    params = list(params)
    layouts = whole.resolve(tensors, params, dict.fromkeys(params, "of the base optimizer"))
    return layouts is None or any(
        tensor_parallel.groups_of(param, "of the base optimizer") for param in params
    )


def from_config(
    params: ParamsT,
    optimizer: str = "AdamW",
    alpha: float = -5.0,
    beta: float = 0.99,
    nonfinite: str = "raise",
    **base: Any,
) -> E:
    """Make E from the params of ``{"type": "E", "params": {...}}`` in a DeepSpeed JSON.

    Args:
        params: the model's parameters or groups of them.
        optimizer: name of the base optimizer in ``torch.optim``, such as "AdamW".
        alpha: see :class:`E`.
        beta: see :class:`E`.
        nonfinite: see :class:`E`.
        base: the base optimizer's own arguments.

    Raises:
        ValueError: there is no such base optimizer.
    """
    make = getattr(torch.optim, optimizer, object) if isinstance(optimizer, str) else object
    make = inspect.unwrap(make)  # of what registration.py puts around ALTO
    if not (isinstance(make, type) and issubclass(make, Optimizer)):
        raise ValueError(
            f'"optimizer": {optimizer!r} names no optimizer in torch.optim; write for example '
            '{"type": "E", "params": {"optimizer": "AdamW", "alpha": -5, "beta": 0.99}}.'
        )
    return E(make(params, **base), alpha=alpha, beta=beta, nonfinite=nonfinite)
