"""What megatron-core's optimizers hold: read from their own lists, never guessed from shapes.

The one module that knows the attributes of megatron-core's classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from alto_ds.layout.megatron import Owners, Range

# Of each class, the lists of parameters and those of what is updated in their place: one list for
# each parameter group. Parameters that are in none of them are updated themselves.
_LISTS = {
    "FP32Optimizer": (),
    "Float16OptimizerWithFloat16Params": (("float16_groups", "fp32_from_float16_groups"),),
    "DistributedOptimizer": (
        ("model_fp32_groups", "shard_fp32_groups"),
        ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ),
}


class Held(NamedTuple):
    """What one of megatron-core's optimizers updates.

    Attributes:
        params: for each parameter group, the parameters that any rank updates a range of, in an
            order that is the same on all ranks that share them.
        ranges: what each tensor of this rank is.
    """

    params: list[list[Tensor]]
    ranges: dict[Tensor, Range]


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers of which megatron-core's optimizer is a chain, those that have parameters."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if part.optimizer is not None]


def read(part: Any) -> Held:
    """Read what ``part`` of a chain holds. All ranks call this together, in the order of the chain.

    Raises:
        RuntimeError: the class, or this version of it, is not known.
    """
    kind = type(part).__name__
    if kind not in _LISTS:
        raise RuntimeError(
            f"alto_ds does not know megatron-core's {kind}, and so not which layers are in its "
            f"tensors; it knows {', '.join(_LISTS)}."
        )
    try:
        return _read(part, kind == "DistributedOptimizer")
    except AttributeError as error:
        raise RuntimeError(
            f"alto_ds reads from megatron-core's {kind} which layers are in its tensors, and this "
            f"version of it differs ({error}). Install a version that the README lists as exact."
        ) from error


def _read(part: Any, is_distributed: bool) -> Held:
    param_of = {
        tensor: param
        for params_name, tensors_name in _LISTS[type(part).__name__]
        for params, tensors in zip(
            getattr(part, params_name), getattr(part, tensors_name), strict=True
        )
        for param, tensor in zip(params, tensors, strict=True)
    }
    groups = [group["params"] for group in part.optimizer.param_groups]
    held = [[param_of.get(tensor, tensor) for tensor in tensors] for tensors in groups]
    ranges = {}
    for tensors, params in zip(groups, held, strict=True):
        for tensor, param in zip(tensors, params, strict=True):
            start = part._get_model_param_range_map(param)["param"].start if is_distributed else 0
            ranges[tensor] = Range(param, start)
    return Held(_held_by_any_rank(part, held) if is_distributed else held, ranges)


def _held_by_any_rank(part: Any, held: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The parameters of each group of a DistributedOptimizer, in the order of its buffers.

    A rank knows the groups of those parameters that it has a piece of, and some rank has a piece
    of each. megatron-core forgets the rest when it cuts them, and the rule by which it sorts them
    is the user's own.
    """
    params = [param for buffer in part.buffers for param in buffer.param_index_map]
    group_here = {param: place for place, found in enumerate(held) for param in found}
    group = part.data_parallel_group
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, [group_here.get(param) for param in params], group=group)
    of_any: list[list[Tensor]] = [[] for _ in held]
    for param, places in zip(params, zip(*of_ranks, strict=True), strict=True):
        (place,) = {place for place in places if place is not None}
        of_any[place].append(param)
    return of_any


def owners_of(part: Any, params: Iterable[Any], pg_collection: Any) -> dict[Tensor, Owners]:
    """Who holds the rest of each parameter.

    Args:
        part: of a chain of optimizers.
        params: parameters of this rank's model.
        pg_collection: the process groups that ``get_megatron_optimizer`` was given, else None.
    """
    # Absent where nothing is sharded over data-parallel ranks.
    of_ranges = getattr(part, "data_parallel_group", None)
    return {param: Owners(of_ranges, _tensor_parallel(param, pg_collection)) for param in params}


def _tensor_parallel(param: Any, pg_collection: Any) -> Any:
    """The group whose ranks have the other parts of a layer; None where it is not cut."""
    from megatron.core import parallel_state

    if not getattr(param, "tensor_model_parallel", False):
        return None
    is_expert = not getattr(param, "allreduce", True)  # then its gradient has groups of its own
    given = getattr(pg_collection, "expt_tp" if is_expert else "tp", None)
    if given is not None:
        return given
    if is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def names_of(model_chunks: Sequence[Any]) -> dict[Tensor, str]:
    """The names of all parameters, as in the model that is inside megatron-core's wrappers.

    Several chunks of a pipeline stage are told apart as in megatron-core's checkpoints: ``model0.``
    """
    names = {}
    for place, chunk in enumerate(model_chunks):
        prefix = f"model{place}." if len(model_chunks) > 1 else ""
        for name, param in chunk.named_parameters():
            while name.startswith("module."):
                name = name.removeprefix("module.")
            names[param] = prefix + name
    return names
