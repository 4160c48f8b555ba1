"""What must be there before the first step: the data on all ranks, and DeepSpeed's engine."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig

from alto_ds import checkpoint
from alto_ds.pretrain.data.sequences import Sequences, make_sequences
from alto_ds.pretrain.model import make_model, model_config, parameter_groups
from alto_ds.pretrain.monitors import SECTIONS
from alto_ds.pretrain.ranks import PREPARATION_TIMEOUT, SetupError, on_ranks
from alto_ds.pretrain.settings import ModelSettings, Settings


def checkpoints_of(settings: Settings) -> Path:
    """Folder of the run's checkpoints."""
    return settings.run.output_dir / "checkpoints"


def prepare_data(settings: Settings) -> Sequences:
    """Read and tokenize the text. All ranks must call this together.

    Raises:
        SetupError: on all ranks, where text or settings do not fit.
    """
    check_batch_size(settings.deepspeed_config, dist.get_world_size())
    check_by_deepspeed(settings.deepspeed_config)
    resumed = checkpoint.exist(checkpoints_of(settings))
    rank = dist.get_rank()
    # The first rank fills the caches of tokenizer and sequences, then the first of each other
    # node, whose folders may be its own; the rest then find them.
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    turns = (rank == 0, first and rank > 0, not first and rank > 0)
    prepared = [
        on_ranks(turn, lambda: make_sequences(settings, resumed), PREPARATION_TIMEOUT)
        for turn in turns
    ]
    data = next(mine for mine in prepared if mine is not None)
    fingerprints: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(fingerprints, data.fingerprint)
    if len(set(fingerprints)) > 1:
        raise SetupError(
            f"the ranks have read different text or trained different tokenizers "
            f"(fingerprints {sorted(set(fingerprints))}): is Python's standard library the same "
            "on all nodes? Name the text by --data, --text or --dataset."
        )
    return data


def make_engine(settings: Settings, tokenizer: Any) -> Any:
    """A model with random weights in DeepSpeed's engine. All ranks must call this together."""
    model = make_model(
        model_config(settings.model, tokenizer),
        settings.run.seed,
        settings.model.activation_checkpointing,
    )
    # DeepSpeed's own measure of throughput waits for the device in each micro step.
    defaults = {"timers": {"throughput": {"enabled": False}}}
    # The run writes to its monitors itself; DeepSpeed would write some of it again.
    config = {k: v for k, v in settings.deepspeed_config.items() if k not in SECTIONS}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        config=defaults | config,
    )
    if compiles(settings.model, engine.zero_optimization_stage()):
        if shutil.which(cxx := os.environ.get("CXX", "g++")) is None:
            if dist.get_rank() == 0:
                print(
                    f"Not compiled: there is no C++ compiler {cxx}; install one, or name it in CXX."
                )
        else:
            # PyTorch's own default is lost with the machine's temporary files.
            cache = Path.home() / ".cache/alto_ds/inductor"
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
            engine.compile(compile_kwargs={"dynamic": False})
    return engine


def compiles(model: ModelSettings, stage: int) -> bool:
    """Whether the model is compiled, given a compiler.

    By default not where that does not pay: the smallest model has trained before it is compiled,
    and under ZeRO-3 the compiled code is broken off wherever parameters are gathered.
    """
    if model.compile is not None:
        return model.compile
    return model.model != "gpt2-tiny" and stage < 3


def check_batch_size(config: Mapping[str, Any], world_size: int) -> None:
    """Refuse a global batch that the ranks cannot share equally, before any text is read.

    Raises:
        SetupError: on all ranks.
    """
    batch_size = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    if not (isinstance(batch_size, int) and isinstance(micro, int) and micro > 0):
        return  # DeepSpeed computes the missing one, or refuses it
    if batch_size % (micro * world_size):
        raise SetupError(
            f"train_batch_size={batch_size} is not a multiple of train_micro_batch_size_per_gpu="
            f"{micro} times {world_size} rank(s); change one of the three."
        )


def check_by_deepspeed(config: Mapping[str, Any]) -> None:
    """Let DeepSpeed check its JSON for this number of ranks, before any text is read.

    Raises:
        SetupError: on all ranks.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(dict(config)))  # which it adds to
    except Exception as error:  # assertions, pydantic's and its own
        raise SetupError(f"DeepSpeed refuses the JSON: {' '.join(str(error).split())}") from error
