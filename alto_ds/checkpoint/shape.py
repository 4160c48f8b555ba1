"""For which ranks, ZeRO stage and precision was a checkpoint written?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alto_ds.checkpoint.deepspeed_files import MODEL_FILES, OPTIMIZER_FILES, read
from alto_ds.checkpoint.ranks import CheckpointError


class Shape(NamedTuple):
    """What must be the same for DeepSpeed's own ``load_checkpoint``.

    Attributes:
        ranks: that share the states, the data-parallel ones.
        tensor_parallel: ranks that share each layer.
        stage: of ZeRO.
        accumulates: whether gradients are accumulated in float32 by ``BF16_Optimizer``.
        dtype: of the model's parameters, such as "bfloat16".
    """

    ranks: int
    tensor_parallel: int
    stage: int
    accumulates: bool
    dtype: str

    def fits(self, other: Shape) -> bool:
        """Whether a checkpoint of the one loads as the other; at stage 0 all ranks hold all."""
        return self == (other._replace(ranks=self.ranks) if other.stage == 0 else other)

    def __str__(self) -> str:
        parallel = f" x {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        accumulates = " with float32 accumulation" if self.accumulates else ""
        ranks = f"{self.ranks}{parallel} rank{'s' if self.ranks > 1 or parallel else ''}"
        return f"{ranks}, ZeRO stage {self.stage}, {self.dtype}{accumulates}"


def shape_of_engine(engine: Any) -> Shape:
    """The shape of the checkpoints that an engine of DeepSpeed writes."""
    accumulates = hasattr(engine.optimizer, "bf16_groups")
    return Shape(
        ranks=engine.seq_dp_world_size,
        tensor_parallel=engine.mp_world_size,
        stage=1 if accumulates else int(engine.zero_optimization_stage()),
        accumulates=accumulates,
        dtype=_name(next(p.dtype for p in engine.module.parameters() if p.requires_grad)),
    )


def shape_of_files(folder: Path) -> Shape:
    """The shape of a checkpoint by its files. They are not read, only their tables of contents.

    Raises:
        CheckpointError: they are not those of DeepSpeed's ``save_checkpoint``.
    """
    models, optimizers = (sorted(folder.glob(f)) for f in (MODEL_FILES, OPTIMIZER_FILES))
    if not models:
        raise CheckpointError(f"{folder} has no file {MODEL_FILES}, as DeepSpeed writes them")
    try:
        model = read(models[0])
        optimizer = read(optimizers[0]) if optimizers else {}
        state = optimizer.get("optimizer_state_dict", {"zero_stage": 0})
        return Shape(
            ranks=model["dp_world_size"],
            tensor_parallel=model["mp_world_size"],
            stage=int(state.get("zero_stage", 1)),
            accumulates="zero_stage" not in state,
            dtype=dtype_of(model),
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise CheckpointError(
            f"{folder} is not what DeepSpeed's save_checkpoint writes ({error!r})"
        ) from error


def problem_of_count(folder: Path, shape: Shape) -> str | None:
    """Whether files of the optimizer's states are missing, or there are more than ranks."""
    found, wanted = len(list(folder.glob(OPTIMIZER_FILES))), shape.ranks * shape.tensor_parallel
    if shape.stage == 0 or found == wanted:
        return None
    return f"it has {found} files {OPTIMIZER_FILES} in place of {wanted}"


def dtype_of(model: Mapping[str, Any]) -> str:
    """The dtype of the model's first trained parameter in DeepSpeed's file, such as "bfloat16"."""
    names = [name for shapes in model["param_shapes"] or () for name in shapes]
    tensors = [model["module"][names[0]]] if names else model["module"].values()
    return _name(next(t.dtype for t in tensors if torch.is_floating_point(t)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
