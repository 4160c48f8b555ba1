"""All that is known of DeepSpeed outside ``layout/``: its lists, and what is refused.

DeepSpeed looks an optimizer type that it does not know up in ``torch.optim`` and accepts it under
ZeRO where its class is in a list of its own. Both are open to additions, so nothing is patched,
and DeepSpeed is never imported: it has been by the time it makes an optimizer.

What ALTO and E cannot compute exactly is refused here, on all ranks alike and before a weight has
changed. Wrong settings are refused in ``settings.py``, tensors of unknown origin in ``layout/``,
and in ``states.py`` states that do not fit, on the rank that has them.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.optim import Optimizer

from alto_ds.layout import Layer, zero
from alto_ds.settings import WITHOUT_AUTO, by_batch_size
from alto_ds.trust_ratio import add_over_ranks, rows_to_add

_ZERO_UTILS = "deepspeed.runtime.zero.utils"
_VERIFIED = ((0, 19, 8), (0, 20))  # the first version of DeepSpeed and the first that is too new


def register(name: str, factory: Callable[..., Optimizer]) -> None:
    """Let DeepSpeed make an optimizer of type ``name`` by ``factory(params, **json_params)``.

    "auto" in these params has become numbers by then: see :func:`fill_in_auto`. Rank 0 prints them.
    """

    @functools.wraps(factory, updated=())
    def make(params: Any, **given: Any) -> Optimizer:
        meant = _before_trainer(name, given)
        filled = fill_in_auto(name, meant, _global_batch_size)
        if filled is not meant:
            numbers = (f"{key}={filled[key]}" for key in _auto_keys(name))
            say_on_rank_0(f'{name}: "auto" stands for {", ".join(numbers)}')
        return factory(params, **filled)

    setattr(torch.optim, name, make)


def fill_in_auto(name: str, given: dict[str, Any], batch_size: Callable[[], int]) -> dict[str, Any]:
    """Replace "auto" by the numbers of :func:`~alto_ds.settings.by_batch_size`.

    "auto" for one of α and β1 stands for both where the other is left out.

    Args:
        name: "ALTO" or "E".
        given: the params of the JSON's optimizer.
        batch_size: asked for the global batch where there is an "auto".

    Returns:
        Other params, or ``given`` itself where there is no "auto".

    Raises:
        ValueError: ``batch_size`` does not know it.
    """
    keys = _auto_keys(name)
    if not any(_is_auto(given.get(key)) for key in keys):
        return given
    alpha, betas = by_batch_size(batch_size())
    numbers = (alpha, betas[0] if name == "E" else betas)
    filled = dict(given)
    for key, number in zip(keys, numbers, strict=True):
        if _is_auto(given.get(key, "auto")):
            filled[key] = number
    return filled


def _before_trainer(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The params as they stood in the JSON of Hugging Face Trainer.

    Trainer turns ``"betas": "auto"`` into Adam's two, and refuses any others; ALTO has three.
    """
    of_trainer = sys.modules.get("transformers.integrations.deepspeed")
    betas = given.get("betas")
    if (
        name == "ALTO"
        and of_trainer is not None
        and of_trainer.deepspeed_config() is not None
        and isinstance(betas, Sequence)
        and len(betas) == 2
    ):
        return given | {"betas": "auto"}
    return given


def _auto_keys(name: str) -> tuple[str, str]:
    return "alpha", "beta" if name == "E" else "betas"


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _global_batch_size() -> int:
    """``train_batch_size`` of DeepSpeed's engine that is making an optimizer now.

    Raises:
        ValueError: there is none.
    """
    engine = calling_engine()
    if engine is None:
        raise ValueError(
            '"auto" needs the global batch of a DeepSpeed JSON, and no engine of DeepSpeed makes '
            f"this optimizer; {WITHOUT_AUTO}"
        )
    return int(engine.train_batch_size())


def calling_engine() -> Any:
    """DeepSpeed's engine that is making or stepping an optimizer now; None where there is none.

    DeepSpeed tells an optimizer nothing of the engine, so it is looked for among the callers.
    """
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", ())
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, engine):
            return caller
        frame = frame.f_back
    return None


def support_in_zero(optimizer: type[Optimizer]) -> None:
    """List ``optimizer`` among those that ZeRO accepts, where DeepSpeed has been imported.

    Called whenever an optimizer is made, so that the order of imports does not matter. Warns, once
    and on rank 0, where DeepSpeed's version is not among those that the tests have seen.
    """
    zero_utils = sys.modules.get(_ZERO_UTILS)
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and optimizer not in supported:
        supported.append(optimizer)
        _check_version(sys.modules["deepspeed"])


def warn_on_rank_0(message: str) -> None:
    """Warn once for all ranks."""
    if _is_rank_0():
        warnings.warn(message, stacklevel=4)


def say_on_rank_0(message: str) -> None:
    """Print one line for all ranks, where errors are printed."""
    if _is_rank_0():
        print(message, file=sys.stderr, flush=True)


def _is_rank_0() -> bool:
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    return rank == 0


def _check_version(deepspeed: Any) -> None:
    version = getattr(deepspeed, "__version__", "0")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    first, too_new = _VERIFIED
    if not first <= numbers < too_new:
        warn_on_rank_0(
            f"alto_ds has been tested with DeepSpeed from {'.'.join(map(str, first))} to before "
            f"{'.'.join(map(str, too_new))}; this is {version}. It looks for the attributes "
            f"{', '.join(zero.ATTRIBUTES)}, and refuses to step where they do not fit; compare "
            "alto_ds.ALTO.trust_ratios() with a run on one rank before you rely on it."
        )


def is_dummy_step(layers: Sequence[Layer], grads: Sequence[Tensor]) -> bool:
    """Whether a wrapper calls ``step()`` just to have the states made.

    DeepSpeed's FP16_UnfusedOptimizer does so when it is made, with gradients of zeros. Such a call
    must not count as a step, nor decay the weights. All ranks that share a layer must call this
    together, for they must decide alike.

    Args:
        layers: those of which the optimizer's tensors are a wrapper's copies.
        grads: their gradients, in the same order.
    """
    nonzero = torch.stack([grad.any() for grad in grads]).float()
    add_over_ranks(nonzero, rows_to_add(layers))
    return not nonzero.any()


def hint_at_placeholders(params: Iterable[Any]) -> str:
    """A sentence for whoever has chosen what decays by ``ndim`` under ``deepspeed.zero.Init``.

    Empty where not all of ``params`` are partitioned, or their shapes are one-dimensional indeed.
    """
    params = list(params)
    partitioned = [param for param in params if param.numel() == 0 and hasattr(param, "ds_shape")]
    if len(partitioned) < len(params) or all(len(p.ds_shape) == 1 for p in partitioned):
        return ""
    return (
        " All parameters are partitioned by deepspeed.zero.Init, where ndim and shape are those of "
        "one-dimensional placeholders: a rule such as len(param.shape) == 1 takes matrices for "
        "biases there. Use len(param.ds_shape), or the parameters' names."
    )


def refuse_at_first_gradient(name: str, optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Refuse ZenFlow and SuperOffload before they change a weight; they may never call us.

    It is asked once, when the first gradient of ``params`` is there, for ZenFlow updates weights
    in that backward pass. Does nothing where DeepSpeed has not been imported.

    Args:
        name: the optimizer's.
        optimizer: what should update the weights.
        params: the model's own parameters.
    """
    trained = [param for param in params if param.requires_grad]
    if "deepspeed" not in sys.modules or not trained:
        return
    ours = weakref.ref(optimizer)

    def ask(_: Tensor) -> None:
        asked = ours()
        if asked is not None:
            if _zenflow_holds(trained[0]):
                raise _zenflow_error(name)
            refuse_other_updates(name, asked.param_groups, trained[:1])
        handles.pop().remove()  # only now: another backward pass after a refusal is refused, too

    handles = [register_multi_grad_hook(trained, ask, mode="any")]


def _zenflow_holds(param: Tensor) -> bool:
    """Whether an optimizer of ZenFlow's own updates ``param``.

    Under ZeRO 1 and 2 nothing leads from a parameter to it, so all objects are looked through,
    which takes a tenth of a second.
    """
    return any(
        any(param is held for group in found.param_groups for held in group["params"])
        for found in gc.get_objects()
        if type(found).__name__ == "ZenFlowSelectiveAdamW"
    )


def refuse_other_updates(
    name: str, groups: Sequence[dict[str, Any]], params: Iterable[Any]
) -> None:
    """Refuse ZenFlow and SuperOffload, which update weights by an Adam of their own.

    Args:
        name: the optimizer's.
        groups: its parameter groups as they are now.
        params: the model's own parameters.

    Raises:
        RuntimeError: one of the two is at work.
    """
    zero3 = next((p._z3_optimizer for p in params if hasattr(p, "_z3_optimizer")), None)
    tensors = (tensor for group in groups for tensor in group["params"][:1])
    if getattr(zero3, "zenflow", False) or any(hasattr(t, "overlap_grad") for t in tensors):
        raise _zenflow_error(name)
    if type(zero3).__name__ == "SuperOffloadOptimizer_Stage3":
        raise RuntimeError(
            f"{name} cannot be used with SuperOffload, which updates weights by an Adam of its "
            'own: remove "super_offload" from "offload_optimizer".'
        )


def refuse_step_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Refuse what ``step()`` is given beside a closure; ZenFlow gives its number of the step.

    Raises:
        RuntimeError: ZenFlow calls.
        TypeError: there is another argument.
    """
    if "step_id" in arguments:
        raise _zenflow_error(name)
    if arguments:
        raise TypeError(f"{name}.step() got an unexpected argument {next(iter(arguments))!r}.")


def _zenflow_error(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} cannot be used with ZenFlow, which updates the most important columns by an Adam "
        'of its own: remove "zenflow" from "zero_optimization".'
    )


def refuse_swapping(group: dict[str, Any], params: Iterable[Any], names: zero.Names) -> None:
    """Refuse what ZeRO-Infinity's swapping to NVMe does wrong, for any optimizer.

    Args:
        group: a parameter group as ``step()`` finds it, with ZeRO-3's tensors.
        params: what the group held when the optimizer was made.
        names: a name for each parameter.

    Raises:
        RuntimeError: there are too few buffers, which DeepSpeed would report in the second step
            by an assertion that names no setting; or states are not float32, as its buffers are;
            or a large gradient would get lost, because direct I/O of a misaligned piece of memory
            fails without an error.
    """
    zero3 = next((p._z3_optimizer for p in params if hasattr(p, "_z3_optimizer")), None)
    swapper = getattr(zero3, "optimizer_swapper", None)
    if swapper is None:
        return
    buffers = swapper.swap_config.buffer_count
    if buffers < 5:
        raise RuntimeError(
            f'alto_ds: "offload_optimizer": {{"buffer_count": {buffers}}} is too few; write 5, for '
            "the parameter, its gradient and three states."
        )
    if group["state_dtype"] != "fp32":
        raise RuntimeError(
            f'ALTO: "state_dtype": "{group["state_dtype"]}" cannot be used with offload to NVMe, '
            'where DeepSpeed keeps all states in float32; write "fp32", or "device": "cpu" under '
            '"offload_optimizer".'
        )
    for flat in group["params"]:
        offset = 0
        for param in zero.sub_group_of(flat, zero3):
            part = param.ds_tensor.ds_numel
            if offset % swapper.numel_alignment and swapper.is_swappable_tensor(numel=part):
                raise RuntimeError(
                    f"alto_ds: DeepSpeed loses the gradient of {names[param]} on its way to NVMe, "
                    f"for it starts at element {offset} of its sub-group, no multiple of "
                    f'{swapper.numel_alignment}; write "sub_group_size": 1 under '
                    '"zero_optimization", which gives each parameter a sub-group of its own.'
                )
            offset += part


def gradient_error(name: str, param_name: str, kind: str) -> RuntimeError:
    """What to raise where the gradient of a parameter is "sparse" or "complex"."""
    remedy = "make its module with sparse=False"
    if kind == "complex":
        remedy = "train torch.view_as_real() of it instead"
    return RuntimeError(f"{name}: the gradient of {param_name} is {kind}; {remedy}.")


def grad_scaler_error(optimizer: str) -> RuntimeError:
    """What to raise where a GradScaler steps ``optimizer`` on layers that ranks share."""
    return RuntimeError(
        f"{optimizer} cannot be stepped by a torch.amp.GradScaler where ranks share layers: on an "
        "overflow in one rank's part that rank alone would skip the step, and the others would "
        'wait for it or go on without it. Use "bf16", or "fp16" with DeepSpeed\'s own loss '
        'scaling, in place of "torch_autocast" with dtype float16.'
    )
