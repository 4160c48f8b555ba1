"""The command ``python -m alto_ds.pretrain``: from its options to its exit status."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout

import alto_ds  # noqa: F401  registers the optimizer types
from alto_ds.pretrain import checkpoints, setup
from alto_ds.pretrain.identity import check_identity, identity_of, write_identity
from alto_ds.pretrain.loop import evaluate, train
from alto_ds.pretrain.metrics import Metrics, perplexity
from alto_ds.pretrain.model import save_model
from alto_ds.pretrain.ranks import SetupError, init_distributed, on_ranks
from alto_ds.pretrain.settings import SIZES, DataSettings, ModelSettings, RunSettings, Settings

NAME = "alto_ds.pretrain"
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended

Part = TypeVar("Part", ModelSettings, DataSettings, RunSettings)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on this rank, then end the process."""
    settings = parse_arguments(argv)
    if get_accelerator().device_name() == "cpu":
        # Compiling DeepSpeed's shared-memory collectives takes longer than a small run; gloo
        # does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        init_distributed(timedelta(seconds=settings.run.timeout))
        # Before any collective: otherwise, with NCCL, all ranks of a node use its first GPU.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        finished = pretrain(settings)
    except (SetupError, checkpoints.CheckpointError) as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{NAME}: {error}", file=sys.stderr)
        sys.exit(2)
    # Otherwise Python may exit while a thread of gloo still frees the last gathered tensors.
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if finished else INTERRUPTED)


def pretrain(settings: Settings) -> bool:
    """Train a model from the settings, or go on where an earlier start of the run stopped.

    All ranks must call this together, after :func:`~alto_ds.pretrain.ranks.init_distributed`.

    Returns:
        True where the last step was done, the same on every rank; then the model and the curves
        are written. False where a signal ended the run before it.

    Raises:
        SetupError: on all ranks, where text, settings or checkpoint do not fit.
        CheckpointError: on all ranks, where the checkpoint cannot be loaded.
    """
    folder, writes = settings.run.output_dir, dist.get_rank() == 0
    data = setup.prepare_data(settings)
    engine = setup.make_engine(settings, data.tokenizer)
    identity = identity_of(settings, engine, data.fingerprint)
    saved = setup.checkpoints_of(settings)
    step = 0
    if checkpoints.found(saved):
        on_ranks(writes, lambda: check_identity(folder, identity))
        step = checkpoints.load(engine, saved)["step"]
    metrics = Metrics(folder, step, settings.steps, writes)

    def save(step: int) -> None:
        if writes:
            write_identity(folder, identity)
        checkpoints.save(engine, saved, step, {"step": step})

    step = train(engine, data, settings, step, metrics, save)
    metrics.close()
    if step < settings.steps:
        return False
    save_model(engine, data.tokenizer, folder / "model")
    loss = evaluate(engine, data.validation)
    metrics.draw()
    if writes:
        print(
            f"Final held-out perplexity {perplexity(loss):.2f} after {step} steps; "
            f"model in {folder / 'model'}, curves in {folder / 'curves.png'}"
        )
    return True


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line; ends the process with a message where it is wrong."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    path = given["deepspeed_config"]
    if not path or not os.path.isfile(path):
        parser.error(f"--deepspeed_config={path} is no file; name a JSON from configs/")
    try:
        config = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        parser.error(f"--deepspeed_config={path} is no JSON: {error}")
    try:
        return Settings(
            model=_part(ModelSettings, given),
            data=_part(DataSettings, given),
            run=_part(RunSettings, given),
            deepspeed_config=config,
        )
    except ValueError as error:
        parser.error(f"{error}")


def _part(kind: type[Part], given: dict[str, Any]) -> Part:
    """The settings of one kind; what was not given keeps the default that the class names."""
    names = [field.name for field in fields(kind)]
    return kind(**{name: given[name] for name in names if name in given})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Pre-train GPT-2 with DeepSpeed. The same command again resumes a run.",
        argument_default=argparse.SUPPRESS,  # the defaults are those of the settings
    )
    parser.add_argument("--model", required=True, choices=SIZES, help="size of the model")
    parser.add_argument(
        "--output_dir", required=True, type=Path, help="checkpoints, metrics and the model"
    )
    data = parser.add_argument_group("text (default: Python's own standard library)")
    data.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text files")
    data.add_argument("--dataset", help="hub name, local folder or .jsonl file for `datasets`")
    data.add_argument("--dataset_config", help="configuration of the dataset on the hub")
    data.add_argument("--dataset_split", help="split of the dataset")
    data.add_argument("--text_column", help="column of the dataset with the text")
    data.add_argument("--streaming", action="store_true", help="do not download the dataset first")
    data.add_argument("--validation_fraction", type=float, help="held-out documents")
    data.add_argument("--validation_sequences", type=int, help="at most so many")
    data.add_argument("--tokenizer", help="hub name or folder (default: train a byte-level BPE)")
    data.add_argument("--vocab_size", type=int, help="of the tokenizer to train")
    data.add_argument("--tokenizer_documents", type=int, help="documents to train it on")
    data.add_argument("--seq_length", type=int, help="tokens (default: all that the model takes)")
    run = parser.add_argument_group("run")
    run.add_argument("--max_steps", type=int, help="default: total_num_steps of the scheduler")
    run.add_argument("--eval_interval", type=int, help="steps between evaluations")
    run.add_argument("--save_interval", type=int, help="steps between checkpoints")
    run.add_argument("--dropout", type=float, help="of GPT-2's three kinds")
    run.add_argument("--seed", type=int, help="of weights, order and dropout")
    run.add_argument(
        "--timeout",
        type=int,
        default=int(default_pg_timeout.total_seconds()),
        help="seconds a rank waits for the others in training before it ends with an error "
        "(default: 600, or the minutes in DEEPSPEED_TIMEOUT)",
    )
    run.add_argument("--local_rank", type=int, help="set by the launcher")
    deepspeed.add_config_arguments(parser)
    return parser
