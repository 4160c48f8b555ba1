"""megatron-core's checkpoints, with all states and the number of steps inside.

megatron-core looks for ``step`` in the states, or in the groups where TransformerEngine is
installed, and does not load it together with the other states. Where it gathers the states of
``DistributedOptimizer`` it knows Adam's two by name. So the number of steps is written into states
and groups, and each further state is gathered in the place of ``exp_avg``. This is done by hooks of
our optimizer, and by attributes of the one ``DistributedOptimizer`` that holds it, in front of its
methods of the same names. megatron-core's classes are left as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam, Optimizer

from alto_ds import registration, settings, states
from alto_ds.adaptor import E
from alto_ds.optimizer import ALTO
from alto_ds.states import E_EXP_AVG_GRAD, EXP_AVG, EXP_AVG_SQ, STEP

# Those of ALTO that no scheduler writes, and by which training goes on.
_SETTINGS = tuple(
    name
    for name in settings.NAMES
    if name not in ("lr", "weight_decay", "trust_ratio", "nonfinite")
)
_REMEDY = (
    "Load a checkpoint that was saved with these settings, or the weights alone "
    "(--no-load-optim in Megatron-LM)."
)


def carry_all_states(parts: Sequence[Any]) -> None:
    """Let megatron-core's checkpoints save and load all states of what ``parts`` have inside.

    They are made here already, for megatron-core loads into the states that are there. All ranks
    must call this together.

    Args:
        parts: this rank's chain of megatron-core's optimizers, with ALTO or E inside.
    """
    for part in parts:
        _carry(part)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, any(map(_is_padded_within, parts)))
    if any(of_ranks):
        for part in parts:
            part.sharded_param_state_fully_reshardable = _refuse_fully_reshardable


def _carry(part: Any) -> None:
    optimizer = part.optimizer
    base = optimizer.optimizer if isinstance(optimizer, E) else optimizer
    if isinstance(optimizer, ALTO):
        _make_states(optimizer)
        part.init_state_fn = lambda *_: None
    else:
        part.init_state_fn(base, part.config)
        _make_states_beside_adam(base)
    if isinstance(base, ALTO | Adam):  # the Adam of TransformerEngine and Apex counts in the groups
        base.register_state_dict_post_hook(_tell_steps)
        base.register_load_state_dict_pre_hook(_take_steps)
    if isinstance(optimizer, E):
        _keep_groups(base)
    if type(part).__name__ == "DistributedOptimizer":
        _carry_over_ranks(part)


def _make_states(optimizer: ALTO) -> None:
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            made = states.make(tensor, group["alpha"], group["state_dtype"])
            optimizer.state[tensor].update(made)


def _make_states_beside_adam(base: Optimizer) -> None:
    """Make E's state, and the number of steps, beside the moments that megatron-core has made."""
    for group in base.param_groups:
        for tensor in group["params"]:
            state = base.state[tensor]
            state[E_EXP_AVG_GRAD] = states.zeros(E_EXP_AVG_GRAD, tensor)
            if isinstance(base, Adam):
                state[STEP] = torch.zeros(())


def _tell_steps(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the number of steps where megatron-core may look for it: see the module.

    Raises:
        RuntimeError: not all tensors have taken the same number, and megatron-core keeps one.
    """
    steps = {int(state[STEP]) for state in state_dict["state"].values()}
    if len(steps) > 1:
        raise RuntimeError(
            f"alto_ds.megatron: parameters have taken {', '.join(map(str, sorted(steps)))} steps, "
            "and megatron-core's checkpoints keep one number for all of them; see that each "
            "parameter gets a gradient in each step."
        )
    for step in steps:  # none where this rank holds nothing
        for key, state in state_dict["state"].items():
            state_dict["state"][key] = {**state, STEP: torch.tensor(float(step))}
        for group in state_dict["param_groups"]:
            group[STEP] = step


def _take_steps(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, after a look at whether these states are the optimizer's own.

    Raises:
        RuntimeError: they are another optimizer's, or of other settings. Nothing is loaded then.
    """
    taken = dict(state_dict["state"])
    groups = []
    for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        _check_group(saved, own)
        for key in saved["params"]:
            _check_names(taken.get(key, {}), _names_of(optimizer))
            taken[key] = {**taken[key], STEP: torch.tensor(float(saved[STEP]))}
        groups.append({name: value for name, value in saved.items() if name != STEP})
    _say_what_is_replaced(state_dict["param_groups"], optimizer.param_groups)
    return {**state_dict, "state": taken, "param_groups": groups}


def _say_what_is_replaced(saved: Sequence[Any], own: Sequence[Any]) -> None:
    """Say on rank 0 which settings of the checkpoint's groups replace those just given."""
    differ = dict.fromkeys(
        f"{name}={theirs[name]!r} in place of {ours[name]!r}"
        for theirs, ours in zip(saved, own, strict=True)
        for name in _SETTINGS
        if name in theirs and name in ours and _plain(theirs[name]) != _plain(ours[name])
    )
    if differ:
        registration.say_on_rank_0(
            f"alto_ds.megatron: the checkpoint's settings are used: {', '.join(differ)}."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_group(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises RuntimeError where a group is another optimizer's, or of an α with other states."""
    # On a rank that holds nothing megatron-core may not know the number of steps.
    needed = ("alpha" in own, "alpha"), (bool(saved["params"]), STEP)
    missing = [name for is_needed, name in needed if is_needed and name not in saved]
    if missing:
        raise RuntimeError(
            f"alto_ds.megatron: the checkpoint has no {' and no '.join(missing)}: it is another "
            f"optimizer's. {_REMEDY}"
        )
    if "alpha" in own and bool(saved["alpha"]) != bool(own["alpha"]):
        raise RuntimeError(
            f"alto_ds.megatron: the checkpoint is of alpha={saved['alpha']}, and this optimizer "
            f"has alpha={own['alpha']}, which keeps other states. {_REMEDY}"
        )


def _check_names(found: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Raises RuntimeError where what was loaded for a tensor lacks one of the states."""
    missing = [name for name in needed if not isinstance(found.get(name), Tensor)]
    if missing:
        raise RuntimeError(
            f"alto_ds.megatron: the checkpoint lacks the state {' and '.join(missing)}: it is "
            f"another optimizer's, or of other settings. {_REMEDY}"
        )


def _names_of(optimizer: Optimizer) -> tuple[str, ...]:
    """What is kept of each tensor but its number of steps, alike on all ranks.

    Args:
        optimizer: ALTO, or E or what is inside it, which is megatron-core's Adam.
    """
    if isinstance(optimizer, ALTO):
        return states.names(max(abs(group["alpha"]) for group in optimizer.param_groups))
    return (EXP_AVG, EXP_AVG_SQ, E_EXP_AVG_GRAD)


def _keep_groups(base: Optimizer) -> None:
    """Let the groups stay the same dicts when states are loaded, as ALTO's do.

    torch puts new ones in their place, and layouts are known by the old ones.
    """
    groups = base.param_groups

    def put_back(base: Optimizer) -> None:
        for group, loaded in zip(groups, base.param_groups, strict=True):
            group.update(loaded)
        base.param_groups = groups

    base.register_load_state_dict_post_hook(put_back)


def _is_padded_within(part: Any) -> bool:
    """Whether a buffer has padding that is not at its end."""
    buckets = (bucket for buffer in getattr(part, "buffers", ()) for bucket in buffer.buckets[:-1])
    return any(bucket.grad_data.numel() != bucket.numel_unpadded for bucket in buckets)


def _refuse_fully_reshardable(*_: Any) -> NoReturn:
    """megatron-core leaves the padding out when it gathers, and counts it when it looks up."""
    raise RuntimeError(
        "alto_ds.megatron: distrib_optim_sharding_type='fully_reshardable' would mix up the "
        "weights and states of layers, with any optimizer: megatron-core pads its buckets for this "
        "model on this number of ranks, and takes them for unpadded in this format. Write "
        "'dp_reshardable' (Megatron-LM: leave out --dist-ckpt-optim-fully-reshardable)."
    )


def _carry_over_ranks(part: Any) -> None:
    """Let a DistributedOptimizer save and load all states in each of its formats."""
    for name in ("dp_reshardable", "fully_reshardable"):
        load = f"load_parameter_state_from_{name}"
        setattr(part, load, _without_steps(part.optimizer, getattr(part, load)))
    part.get_parameter_state_dp_zero = _gather_all(part, part.get_parameter_state_dp_zero)
    part.load_parameter_state_from_dp_zero = _scatter_all(
        part, part.load_parameter_state_from_dp_zero
    )


def _without_steps(optimizer: Any, load: Callable[[Any], None]) -> Callable[[Any], None]:
    """What loads all states into those that are there, where the number of steps is none of them.

    megatron-core would load the number that was there when the loading began, or look for one in
    vain. :func:`_take_steps` has taken it from the groups.
    """

    @torch.no_grad()  # some weights are views of the model's parameters
    def load_without_steps(param_state: Any) -> None:
        names = _names_of(optimizer)
        for found in _of_tensors(param_state):
            _check_names(found, names)
        with _renamed(optimizer, {name: name for name in names}):
            load(param_state)

    return load_without_steps


def _of_tensors(param_state: Any) -> Iterator[Mapping[str, Any]]:
    """What was loaded for each tensor: the dicts, at whatever depth, that have its weights."""
    if isinstance(param_state, Mapping) and "param" in param_state:
        yield param_state
    elif isinstance(param_state, Mapping | list):
        inner = param_state.values() if isinstance(param_state, Mapping) else param_state
        for found in inner:
            yield from _of_tensors(found)


def _gather_all(part: Any, gather: Callable[..., Any]) -> Callable[..., Any]:
    """What gathers whole states on the first data-parallel rank, or on all.

    Those that Adam has not are gathered in the place of its first moment, with the weights and the
    second moment once more.
    """

    def gather_all(*arguments: Any, **options: Any) -> Any:
        gathered = gather(*arguments, **options)
        for name in _beyond_adam(part.optimizer):
            with _renamed(part.optimizer, {EXP_AVG: name, EXP_AVG_SQ: EXP_AVG_SQ}):
                again = gather(*arguments, **options)
            for buffer, dtype, tensors in _of_buffers(gathered):
                tensors[name] = again[buffer][dtype][EXP_AVG]
        return gathered

    return gather_all


def _scatter_all(part: Any, scatter: Callable[..., None]) -> Callable[..., None]:
    """The inverse: what scatters whole states from the first data-parallel rank."""

    @torch.no_grad()  # some weights are views of the model's parameters
    def scatter_all(gathered: Any, *, update_legacy_format: bool = False) -> None:
        further = _beyond_adam(part.optimizer)
        lacking = [
            f"it lacks the state {name}"
            for _, _, tensors in _of_buffers(gathered)
            for name in further
            if name not in tensors
        ]
        if update_legacy_format and further:
            lacking.append("the format of before 2024 knows no states but Adam's")
        of_ranks: list[Any] = [None] * dist.get_world_size(part.data_parallel_group)
        dist.all_gather_object(of_ranks, lacking[:1], group=part.data_parallel_group)
        for (reason,) in filter(None, of_ranks):
            raise RuntimeError(
                f"alto_ds.megatron: the checkpoint cannot be loaded: {reason}. {_REMEDY}"
            )
        for name in (EXP_AVG, *further):
            state_dict = gathered and dict(gathered)
            for buffer, dtype, tensors in _of_buffers(gathered):
                state_dict[buffer] = state_dict[buffer] | {
                    dtype: tensors | {EXP_AVG: tensors[name]}
                }
            with _renamed(part.optimizer, {EXP_AVG: name, EXP_AVG_SQ: EXP_AVG_SQ}):
                scatter(state_dict, update_legacy_format=update_legacy_format)

    return scatter_all


def _beyond_adam(optimizer: Any) -> list[str]:
    return [name for name in _names_of(optimizer) if name not in (EXP_AVG, EXP_AVG_SQ)]


def _of_buffers(gathered: Any) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Buffer, dtypes and whole tensors of what was gathered; nothing on ranks that have none."""
    for buffer, of_dtypes in (gathered or {}).items():
        if isinstance(of_dtypes, dict):  # else it is a mark of the format
            for dtype, tensors in of_dtypes.items():
                yield buffer, dtype, tensors


@contextlib.contextmanager
def _renamed(optimizer: Any, names: Mapping[str, str]) -> Iterator[None]:
    """For a while, let each tensor have only some of its states, maybe by other names.

    Args:
        optimizer: whose states are meant.
        names: the name of a state by the name that it gets.
    """
    whole = {tensor: dict(state) for tensor, state in optimizer.state.items()}
    try:
        for tensor, state in whole.items():
            optimizer.state[tensor].clear()
            optimizer.state[tensor].update({name: state[own] for name, own in names.items()})
        yield
    finally:
        for tensor, state in whole.items():
            optimizer.state[tensor].clear()
            optimizer.state[tensor].update(state)
