"""Which part of a converted checkpoint is this rank's?

Our own layouts tell, for every stage of ZeRO alike, which range of which layer each tensor of this
rank holds. So one loader serves all of them, and knows no state by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META, PARAM
from deepspeed.checkpoint.universal_checkpoint import _resolve_autotp_partition
from torch import Tensor

from alto_ds.checkpoint.converting import COMMON, PARAMETERS, SCALARS
from alto_ds.checkpoint.deepspeed_files import MODEL_FILES, check_engine, read
from alto_ds.checkpoint.manifest import Manifest
from alto_ds.checkpoint.ranks import CheckpointError, Ranks
from alto_ds.checkpoint.shape import dtype_of
from alto_ds.checkpoint.verifying import manifest_of, problem_on_ranks
from alto_ds.layout import Layout, resolve, tensor_parallel
from alto_ds.states import EXP_AVG, EXP_AVG_SQ

MASTER = "fp32"  # name of the file with a layer's weights
# What DeepSpeed saves of its own beside the caller's client_state.
OWN = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
}


def load_universal(engine: Any, folder: Path, states: bool = True) -> dict[str, Any]:
    """Load what ``python -m alto_ds.checkpoint universal`` has made.

    All ranks must call this together: under ZeRO 0 to 3 or ``BF16_Optimizer``, on any number of
    ranks, with or without tensor parallelism. Each parameter group gets the settings that the
    group of the same number had. Weights and states are those that were saved, to the bit; the
    model's weights are rounded from them.

    Args:
        engine: DeepSpeed's engine, not yet stepped.
        folder: the converted checkpoint; the ranks share it.
        states: False leaves the optimizer as it is, with its states and the settings of its
            groups; weights, schedule, counters and ``client_state`` are loaded.

    Returns:
        The ``client_state`` that was saved with it, and what DeepSpeed adds.

    Raises:
        CheckpointError: on all ranks, where it is not whole, is of another model or of other
            parameter groups, or the engine has been stepped or keeps its states on NVMe.
    """
    check_engine(engine)
    if engine.global_steps > 0:
        raise CheckpointError(
            f"this engine has taken or loaded {engine.global_steps} steps; load into a new one"
        )
    with Ranks() as ranks:
        manifest = ranks.first(lambda: _converted(folder))
        problem = problem_on_ranks(ranks, folder, manifest)
        if problem is not None:
            raise CheckpointError(f"{folder} cannot be loaded: {problem}")
        if hasattr(engine.optimizer, "checkpoint_event_prologue"):  # ZeRO-3: let go of whole layers
            engine.optimizer.checkpoint_event_prologue()
        model = ranks.each(lambda: _load(engine, folder, states))
        _update_model(engine.optimizer)
    return model


def _converted(folder: Path) -> Manifest:
    found = manifest_of(folder)
    if isinstance(found, dict) and SCALARS in found:
        return found
    reason = f" ({found})" if isinstance(found, str) else ""
    raise CheckpointError(
        f"{folder} is no checkpoint that python -m alto_ds.checkpoint universal has made{reason}"
    )


class _Holder(NamedTuple):
    """Tensors of one parameter group, as the optimizer updates them.

    Attributes:
        tensors: the tensors.
        layout: what they hold.
    """

    tensors: list[Tensor]
    layout: Layout


def _holders(engine: Any) -> list[_Holder]:
    wrapper, names = engine.optimizer, _names(engine)
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3, whose groups are empty
        return [
            _Holder([flat], resolve([flat], list(names), names))
            for flat in wrapper.fp32_partitioned_groups_flat
        ]
    kinds = ("bit16_groups", "bf16_groups", "fp16_groups")  # the model's parameters, by the group
    members = next((getattr(wrapper, kind) for kind in kinds if hasattr(wrapper, kind)), None)
    holders = []
    for place, group in enumerate(engine.basic_optimizer.param_groups):
        tensors = group["params"]
        params = tensors if members is None else members[place]
        holders.append(_Holder(tensors, resolve(tensors, params, names)))
    return holders


def _names(engine: Any) -> dict[Tensor, str]:
    return {param: name for name, param in engine.module.named_parameters()}


def _load(engine: Any, folder: Path, states: bool) -> dict[str, Any]:
    """Read this rank's part of weights and states, and all the rest; sends nothing."""
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise CheckpointError(
            'load_universal cannot load states that are kept on NVMe; set "offload_optimizer" in '
            'DeepSpeed\'s JSON to {"device": "cpu"}, or leave it out'
        )
    files, base = _Files(engine, folder), engine.basic_optimizer
    common, model = read(folder / COMMON), read(sorted(folder.glob(MODEL_FILES))[0])
    holders = _holders(engine)
    groups, saved = base.param_groups, common["param_groups"]
    if states and len(groups) != len(saved):
        raise CheckpointError(
            f"{folder} has {len(saved)} parameter groups, and the optimizer {len(groups)}; make "
            "them as they were, or start the states anew"
        )
    if states:
        _check_groups(engine, holders, model["param_shapes"], folder)
    for holder in holders:
        files.read_into(holder, MASTER, holder.tensors)
        if states:
            _load_states(base, holder, files)
    if states:
        for group, settings in zip(groups, saved, strict=True):
            hidden = ("params", "param_names", "nonfinite")
            group.update({key: value for key, value in settings.items() if key not in hidden})
    trained = {layer.param for holder in holders for layer in holder.layout.layers}
    for param in _names(engine).keys() - trained:
        _put_frozen(param, files)
    for name, buffer in engine.module.named_buffers():
        if name in model["module"]:
            buffer.data.copy_(model["module"][name])
    _load_rest(engine, common, model, states)
    return {key: value for key, value in model.items() if key not in OWN}


def _check_groups(engine: Any, holders: list[_Holder], saved: Any, folder: Path) -> None:
    """Refuse groups of other layers, or in another order: their settings would be swapped.

    Args:
        engine: DeepSpeed's engine.
        holders: of the engine's groups, or ZeRO-3's parts of groups.
        saved: by group, or ZeRO-3's part of a group, the layers that the checkpoint has.
        folder: of the checkpoint.
    """
    names, places = _names(engine), getattr(engine.optimizer, "sub_group_to_group_id", {})
    group_of = {
        names[layer.param]: places.get(number, number)
        for number, holder in enumerate(holders)
        for layer in holder.layout.layers
    }
    found = [{group_of.get(name, -1) for name in part} for part in saved if part]
    order = [group for groups in found for group in groups]
    if len(order) > len(found) or -1 in order or order != sorted(order):
        raise CheckpointError(
            f"{folder} has other layers in its parameter groups than the optimizer, or the groups "
            "in another order; make them as they were, or start the states anew"
        )


def _load_states(base: Any, holder: _Holder, files: _Files) -> None:
    """Put new states in place of those that the optimizer may have made."""
    for place, tensor in enumerate(holder.tensors):
        layers = files.layers_in(holder, place)
        state = base.state[tensor]
        state.clear()
        numbers = [files.scalars.get(name, {}) for name in layers]
        if any(other != numbers[0] for other in numbers):
            raise CheckpointError(
                f"{', '.join(layers)} are in one tensor of this engine, and have taken different "
                "numbers of steps; load the checkpoint at ZeRO stage 0"
            )
        for key, value in (numbers[0] if numbers else {}).items():
            state[key] = value.clone() if isinstance(value, Tensor) else value
        for key in sorted({key for name in layers for key in files.states_of(name)}):
            dtype = files.dtype_of(layers, key)
            state[key] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)
    names = [
        name for place in range(len(holder.tensors)) for name in files.layers_in(holder, place)
    ]
    for key in {key for name in names for key in files.states_of(name)}:
        files.read_into(holder, key, [base.state[tensor].get(key) for tensor in holder.tensors])


def _put_frozen(param: Any, files: _Files) -> None:
    """Load a parameter that is not trained, or this rank's part of it."""
    if not hasattr(param, "ds_tensor"):
        param.data.copy_(files.own(param, MASTER).view(param.shape))
        return
    part = param.ds_tensor.ds_numel
    start = dist.get_rank(param.ds_process_group) * part
    values = files.own(param, MASTER)[start : start + part]
    param.ds_tensor.data[: values.numel()].copy_(values)


def _load_rest(engine: Any, common: Any, model: Any, states: bool) -> None:
    """The schedule, the loss scale and the counters."""
    scheduler, wrapper = engine.lr_scheduler, engine.optimizer
    if scheduler is not None and model["lr_scheduler"] is not None:
        scheduler.load_state_dict(model["lr_scheduler"])
        if not states:
            set_rates(engine)
    was_half = dtype_of(model) == "float16"
    if was_half and engine.fp16_enabled() and hasattr(wrapper, "loss_scaler"):
        wrapper.loss_scaler = common["loss_scaler"]
        wrapper.dynamic_loss_scale = common["dynamic_loss_scale"]
    engine.global_steps = model["global_steps"]
    engine.global_samples = model["global_samples"]
    engine.skipped_steps = model["skipped_steps"]


def set_rates(engine: Any) -> None:
    """Give the optimizer's groups the learning rates that the schedule has come to."""
    scheduler = engine.lr_scheduler
    is_deepspeeds = hasattr(scheduler, "last_batch_iteration")
    rates = scheduler.get_lr() if is_deepspeeds else scheduler.get_last_lr()
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _update_model(wrapper: Any) -> None:
    """Round the model's weights from those that the optimizer has; all ranks together."""
    if hasattr(wrapper, "update_lp_params"):  # ZeRO-1, ZeRO-2, BF16_Optimizer
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for place in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(place)
        wrapper.checkpoint_event_epilogue()
    elif hasattr(wrapper, "fp32_groups"):  # stage 0 in half precision
        for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                param.data.copy_(master.data)


class _Files:
    """A converted checkpoint; of its tensors only what is used is read.

    Attributes:
        scalars: by layer and state, what is one number.
    """

    def __init__(self, engine: Any, folder: Path) -> None:
        self._folder = folder
        self._names = _names(engine)
        self.scalars: dict[str, dict[str, Any]] = read(folder / SCALARS)

    def states_of(self, layer: str) -> list[str]:
        found = (path.stem for path in (self._folder / PARAMETERS / layer).glob("*.pt"))
        return [name for name in found if name not in (MASTER, "step")]

    def dtype_of(self, layers: list[str], state: str) -> torch.dtype:
        name = next(layer for layer in layers if state in self.states_of(layer))
        return _tensor_in(self._read(name, state)).dtype

    def layers_in(self, holder: _Holder, place: int) -> list[str]:
        """Names of the layers of one of the holder's tensors, on any rank."""
        layers = holder.layout.layers
        if len(holder.tensors) > 1:  # one for each
            layers = layers[place : place + 1]
        return [self._names[layer.param] for layer in layers]

    def read_into(self, holder: _Holder, state: str, targets: list[Any]) -> None:
        """Read this rank's ranges of a state, or of the weights, into tensors as the holder's."""
        for fragment in holder.layout.fragments:
            target = targets[fragment.tensor]
            param = holder.layout.layers[fragment.layer].param
            if target is None or not (values := self.own(param, state)).numel():
                continue
            values = values[fragment.start : fragment.start + fragment.length]
            if fragment.length == target.numel():  # in any memory format
                target.data.copy_(values.view(target.shape))
            else:
                target.data[fragment.offset : fragment.offset + fragment.length].copy_(values)

    def own(self, param: Any, state: str) -> Tensor:
        """All of a parameter's values that this tensor-parallel rank has, flat."""
        name = self._names[param]
        content = self._read(name, state)
        whole, shape = _tensor_in(content), getattr(param, "ds_shape", param.shape)
        values = whole.flatten()
        if tensor_parallel.groups_of(param, name) or hasattr(param, DS_AUTOTP_UC_META):
            values = _cut(param, content, state)
        if values.numel() != torch.Size(shape).numel():
            raise CheckpointError(
                f"{name} has shape {tuple(whole.shape)} in {self._folder}, and {tuple(shape)} in "
                "this model; load the checkpoint of this model"
            )
        return values

    def _read(self, name: str, state: str) -> Any:
        path = self._folder / PARAMETERS / name / f"{state}.pt"
        if not path.is_file():
            raise CheckpointError(f"{self._folder} has no {state} of {name}")
        return read(path)


def _tensor_in(content: Any) -> Tensor:
    return content[PARAM] if isinstance(content, dict) else content  # flat, from ZeRO-3


def _cut(param: Any, content: Any, state: str) -> Tensor:
    """This tensor-parallel rank's part of a whole layer, flat."""
    group = next(tensor_parallel._known_groups())
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole, shape = _tensor_in(content), list(getattr(param, "ds_shape", param.shape))
    if hasattr(param, DS_AUTOTP_UC_META):
        known = state if state in (MASTER, EXP_AVG_SQ) else EXP_AVG  # others are scaled as m is
        described = content if isinstance(content, dict) else {}
        part = _resolve_autotp_partition(param, described, whole, rank, size, known)
        return whole.flatten() if part is None else part
    shape[param.partition_dim] *= size
    return whole.view(shape).chunk(size, param.partition_dim)[rank].flatten()
