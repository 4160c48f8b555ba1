"""The command ``python -m alto_ds.pretrain``: from its options to its exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout

import alto_ds  # noqa: F401  registers the optimizer types
from alto_ds import checkpoint
from alto_ds.pretrain import setup
from alto_ds.pretrain.deepspeed_json import check_values, read_deepspeed_json
from alto_ds.pretrain.effective import lines_of_engine, lines_of_settings
from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.held_out import write_held_out
from alto_ds.pretrain.identity import (
    STATES,
    check_identity,
    check_states,
    identity_of,
    make_checkpoints_folder,
    settings_of_states,
    write_identity,
    write_versions,
)
from alto_ds.pretrain.lock import one_run
from alto_ds.pretrain.loop import evaluate, train
from alto_ds.pretrain.metrics import Metrics, perplexity
from alto_ds.pretrain.model import save_model
from alto_ds.pretrain.monitors import Monitors, check_installed
from alto_ds.pretrain.options import OneLineParser, add_size, add_source
from alto_ds.pretrain.ranks import SetupError, init_distributed, on_ranks
from alto_ds.pretrain.settings import SIZES, DataSettings, ModelSettings, RunSettings, Settings
from alto_ds.pretrain.signals import watch_launchers

NAME = "alto_ds.pretrain"

Part = TypeVar("Part", ModelSettings, DataSettings, RunSettings)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on this rank, then end the process."""
    settings = parse_arguments(argv)
    watch_launchers()
    if get_accelerator().device_name() == "cpu":
        # Compiling DeepSpeed's shared-memory collectives takes longer than a small run; gloo
        # does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        init_distributed(timedelta(seconds=settings.run.timeout))
        # Before any collective: otherwise, with NCCL, all ranks of a node use its first GPU.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        status = pretrain(settings)
    except (SetupError, checkpoint.CheckpointError) as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{NAME}: {error}", file=sys.stderr)
        status = ExitStatus.REFUSED
    except FloatingPointError as error:
        if dist.get_rank() == 0:
            print(f"{NAME}: {error}", file=sys.stderr)
        status = ExitStatus.NOT_FINITE
    if dist.is_initialized():
        # Otherwise Python may exit while a thread of gloo still frees the last gathered tensors,
        # which aborts the process.
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(status)


def pretrain(settings: Settings) -> ExitStatus:
    """Train a model from the settings, or go on where an earlier start of the run stopped.

    All ranks must call this together, after :func:`~alto_ds.pretrain.ranks.init_distributed`.

    Returns:
        FINISHED where the last step was done, the same on every rank; then the model and the
        curves are written. Another where a signal ended the run before it.

    Raises:
        SetupError: on all ranks, where text, settings or checkpoint do not fit, or another run
            has the output folder.
        FloatingPointError: on all ranks, where loss or weights are not finite any more, or too
            many steps in a row were skipped. It names the last checkpoint before that.
        CheckpointError: on all ranks, where a checkpoint cannot be written, or none be loaded.
    """
    with one_run(settings.run.output_dir) as check_lock:
        return _pretrain(settings, check_lock)


def _pretrain(settings: Settings, check_lock: Callable[[Path], None]) -> ExitStatus:
    folder, writes = settings.run.output_dir, dist.get_rank() == 0
    if writes:
        print(*lines_of_settings(settings), sep="\n", flush=True)
    data = setup.prepare_data(settings)
    engine = setup.make_engine(settings, data.tokenizer)
    if writes:
        print(*lines_of_engine(engine), sep="\n", flush=True)
    identity = identity_of(settings, engine, data.fingerprint)
    saved = setup.checkpoints_of(settings)
    step = 0
    fresh_states = settings.run.fresh_states
    on_ranks(
        writes and checkpoint.exist(saved), lambda: check_identity(folder, identity, fresh_states)
    )
    on_ranks(writes, lambda: make_checkpoints_folder(saved))
    of_states = settings_of_states(identity)
    fresh_for = of_states if fresh_states else None
    resumed = checkpoint.resume(engine, saved, fresh_for)
    if resumed is not None:
        tag, client_state, _ = resumed
        step = client_state["step"]
        on_ranks(not fresh_states, lambda: check_states(tag, client_state, of_states))
    on_ranks(writes, lambda: write_held_out(folder, data.validation))
    on_ranks(writes, lambda: write_versions(folder))
    on_ranks(writes and resumed is None, lambda: write_identity(folder, identity))
    monitors = on_ranks(writes, lambda: Monitors(settings.deepspeed_config, folder, step))
    metrics = on_ranks(True, lambda: Metrics(folder, step, settings.steps, writes, monitors))
    assert metrics is not None

    last_saved = step

    def save(step: int) -> None:
        nonlocal last_saved
        check_lock(saved)
        on_ranks(writes, lambda: write_identity(folder, identity))
        checkpoint.save(
            engine,
            saved,
            f"step{step:07d}",
            {"step": step, "fresh_states": fresh_for, STATES: of_states},
            keep=settings.run.keep_checkpoints,
            keep_every=settings.run.keep_every,
        )
        last_saved = step

    try:
        step, status, loss = train(engine, data, settings, step, metrics, save)
    except FloatingPointError as error:
        metrics.diverged(str(error))
        good = f"step {last_saved}, in {saved}" if last_saved else "none: no step was saved"
        raise FloatingPointError(
            f"{error} This step was not saved; the last good checkpoint is {good}."
        ) from error
    finally:
        metrics.close()
    if status is not ExitStatus.FINISHED:
        return status
    check_lock(saved)
    save_model(engine, data.tokenizer, folder / "model")
    if loss is None:  # all steps had been done before
        loss = evaluate(engine, data.validation)
    metrics.draw()
    if writes:
        print(
            f"Final held-out perplexity {perplexity(loss):.2f} after {step} steps; "
            f"model in {folder / 'model'}, curves in {folder / 'curves.png'}"
        )
    return status


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line and the JSON that it names.

    Ends the process with exit status 2 and one line where something is wrong in them.
    """
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if not _is_text(word):  # neither could it be printed or written down later
            parser.error(f"{word!r} is no UTF-8 text; rename that file or folder")
    known, others = parser.parse_known_args(argv)
    if others:
        parser.refuse(others[0])
    given = vars(known)
    path = given["deepspeed_config"]
    if not path or not os.path.isfile(path):
        parser.error(f"--deepspeed_config={path} is no file; name a JSON from configs/")
    try:
        config = read_deepspeed_json(Path(path))
    except (ValueError, OSError) as error:
        parser.error(f"--deepspeed_config={path}: {error}")
    try:
        settings = Settings(
            model=_part(ModelSettings, given),
            data=_part(DataSettings, given),
            run=_part(RunSettings, given),
            deepspeed_config=config,
        )
    except ValueError as error:
        parser.error(f"{error}")
    try:
        check_values(config)
        check_installed(config)
    except ValueError as error:
        parser.error(f"--deepspeed_config={path}: {error}")
    return settings


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in word


def _part(kind: type[Part], given: dict[str, Any]) -> Part:
    """The settings of one kind; what was not given keeps the default that the class names."""
    names = [field.name for field in fields(kind)]
    return kind(**{name: given[name] for name in names if name in given})


class _Parser(OneLineParser):
    def refuse(self, unknown: str) -> NoReturn:
        """End with an error about an option that there is not."""
        name = unknown.split("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        remedy = f"did you mean {near[0]}?" if near else "--help lists all options"
        self.error(f"{name} is no option; {remedy}")


def _parser() -> _Parser:
    parser = _Parser(
        prog=NAME,
        description="Pre-train GPT-2 with DeepSpeed. The same command again resumes a run.",
        argument_default=argparse.SUPPRESS,  # the defaults are those of the settings
    )
    parser.add_argument(
        "--model", required=True, help=f"{', '.join(SIZES)}, or the config.json of a GPT-2"
    )
    add_size(parser)
    parser.add_argument(
        "--output_dir", required=True, type=Path, help="checkpoints, metrics and the model"
    )
    data = parser.add_argument_group("text (default: Python's own standard library)")
    data.add_argument(
        "--data",
        nargs="+",
        metavar="[WEIGHT] PREFIX",
        help="text prepared by alto_ds.pretrain.prepare; several to blend: 0.3 PREFIX 0.7 PREFIX",
    )
    data.add_argument(
        "--verify_data", action="store_true", help="compare its checksums, too, not sizes alone"
    )
    add_source(data)
    data.add_argument("--streaming", action="store_true", help="do not download the dataset first")
    data.add_argument("--validation_fraction", type=float, help="held-out documents")
    data.add_argument("--validation_sequences", type=int, help="at most so many")
    data.add_argument(
        "--tokenizer",
        help="hub name or folder (default: that of --data, else train a byte-level BPE)",
    )
    data.add_argument("--vocab_size", type=int, help="of the tokenizer to train")
    data.add_argument("--tokenizer_documents", type=int, help="documents to train it on")
    data.add_argument("--seq_length", type=int, help="tokens (default: all that the model takes)")
    run = parser.add_argument_group("run")
    run.add_argument("--max_steps", type=int, help="default: total_num_steps of the scheduler")
    run.add_argument("--eval_interval", type=int, help="steps between evaluations")
    run.add_argument("--save_interval", type=int, help="steps between checkpoints")
    run.add_argument("--keep_checkpoints", type=int, help="the newest that stay (default: 2)")
    run.add_argument("--keep_every", type=int, help="those of every so many steps stay for ever")
    run.add_argument("--save_minutes", type=float, help="minutes between checkpoints, besides")
    run.add_argument(
        "--max_skipped_steps", type=int, help="in a row, for gradients that are not finite"
    )
    run.add_argument(
        "--fresh_states",
        action="store_true",
        help="go on with new states of the optimizer, which may be another; once for the same "
        "settings, until the run is started without this option; a scheduler where there was none "
        "starts at 0",
    )
    run.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="the model and its loss (default: where that pays)",
    )
    run.add_argument(
        "--activation_checkpointing",
        action="store_true",
        help="compute each block again for its gradient, to save memory",
    )
    run.add_argument(
        "--trust_ratios_by_layer",
        action="store_true",
        help="record that of each layer at evaluations, and draw them",
    )
    run.add_argument("--profile", type=int, help="steps to record, in profile.json.gz")
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
