"""megatron-core's LayerWiseDistributedOptimizer, in which a data-parallel rank has whole layers.

megatron-core makes it for Muon and its like only, and does not look at the setting where
``config.optimizer`` is "adam". Here it is made of megatron-core's own parts: Adam's parameter
groups, which it deals out to the ranks. ALTO or E is put inside later, as everywhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from alto_ds.megatron import wrappers


def is_asked_for(config: Any) -> bool:
    """Whether ``config`` asks for it; megatron-core has the setting from 0.18 on."""
    return getattr(config, "use_layer_wise_distributed_optimizer", False)


def make(original: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Return a LayerWiseDistributedOptimizer with Adam inside. All ranks call this together.

    Args:
        original: megatron-core's ``get_megatron_optimizer``.
        given: its arguments, by their names.
    """
    from megatron.core.optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = given["config"]
    if config.bf16:  # then it wants bare optimizers, and makes master weights of what a rank keeps
        without_masters = copy.copy(config)
        without_masters.bf16 = False
        parts = wrappers.parts_of(original(**{**given, "config": without_masters}))
    else:
        parts = wrappers.parts_of(original(**given))
    return LayerWiseDistributedOptimizer(
        [part.optimizer if config.bf16 else part for part in parts],
        config,
        given.get("pg_collection") or ProcessGroupCollection.use_mpu_process_groups(),
        init_state_fn_list=[part.init_state_fn for part in parts],
        model_chunks=given["model_chunks"],
    )


def reasons_against(config: Any, ddp_config: Any) -> Iterator[str]:
    """What cannot be combined with it, each with what to write instead."""
    if config.overlap_param_gather_with_optimizer_step:
        yield (
            "config.overlap_param_gather_with_optimizer_step=True cannot be combined with "
            "use_layer_wise_distributed_optimizer=True; write False."
        )
    for name, place in (("config", config), ("ddp_config", ddp_config)):
        if getattr(place, "use_distributed_optimizer", False):
            yield (
                f"{name}.use_distributed_optimizer=True shards layers, which "
                "use_layer_wise_distributed_optimizer=True leaves whole; write False for one of "
                "them."
            )
