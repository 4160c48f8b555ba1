"""The training run, from the command line to the saved model."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from torch import Tensor

import alto_ds  # noqa: F401  registers the optimizer types
from alto_ds.pretrain.data import Sequences
from alto_ds.pretrain.model import SIZES, make_model, model_config, parameter_groups, save_model
from alto_ds.pretrain.ranks import SetupError, init_distributed, on_ranks
from alto_ds.pretrain.report import Report, perplexity

KEPT_CHECKPOINTS = 2
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
# Sections of DeepSpeed's JSON that decide the weights; others are asked of the engine.
DECISIVE = ("optimizer", "scheduler", "torch_autocast")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ends the process with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        description="Pre-train GPT-2 with DeepSpeed. The same command again resumes a run."
    )
    parser.add_argument("--model", required=True, choices=SIZES, help="size of the model")
    parser.add_argument("--output_dir", required=True, help="checkpoints, metrics and the model")
    data = parser.add_argument_group("text (default: Python's own standard library)")
    data.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 text files")
    data.add_argument("--dataset", help="hub name, local folder or .jsonl file for `datasets`")
    data.add_argument("--dataset_config", help="configuration of the dataset on the hub")
    data.add_argument("--dataset_split", default="train", help="split of the dataset")
    data.add_argument("--text_column", default="text", help="column of the dataset with the text")
    data.add_argument("--streaming", action="store_true", help="do not download the dataset first")
    data.add_argument("--validation_fraction", type=float, default=0.02, help="held-out documents")
    data.add_argument("--validation_sequences", type=int, default=2000, help="at most so many")
    data.add_argument("--tokenizer", help="hub name or folder (default: train a byte-level BPE)")
    data.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer to train")
    data.add_argument(
        "--tokenizer_documents", type=int, default=100_000, help="documents to train it on"
    )
    data.add_argument("--seq_length", type=int, help="tokens (default: all that the model takes)")
    run = parser.add_argument_group("run")
    run.add_argument("--max_steps", type=int, help="default: total_num_steps of the scheduler")
    run.add_argument("--eval_interval", type=int, default=100, help="steps between evaluations")
    run.add_argument("--save_interval", type=int, default=100, help="steps between checkpoints")
    run.add_argument("--dropout", type=float, default=0.0, help="of GPT-2's three kinds")
    run.add_argument("--seed", type=int, default=1234, help="of weights, order and dropout")
    run.add_argument(
        "--timeout",
        type=int,
        default=int(default_pg_timeout.total_seconds()),
        help="seconds a rank waits for the others in training before it ends with an error "
        "(default: 600, or the minutes in DEEPSPEED_TIMEOUT)",
    )
    run.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config_path = arguments.deepspeed_config
    if not config_path or not os.path.isfile(config_path):
        parser.error(f"--deepspeed_config={config_path} is no file; name a JSON from configs/")
    if arguments.text and arguments.dataset:
        parser.error("--text and --dataset both name text; give one of them")
    minima = {
        "max_steps": 1,
        "eval_interval": 1,
        "save_interval": 1,
        "seq_length": 2,  # one token to predict the next from
        "validation_sequences": 1,
        "vocab_size": 257,  # the bytes and end of text
        "tokenizer_documents": 1,
        "timeout": 1,
    }
    for name, minimum in minima.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            parser.error(f"--{name}={value} must be at least {minimum}")
    if not 0 < arguments.validation_fraction < 1:
        parser.error(f"--validation_fraction={arguments.validation_fraction} must be in (0, 1)")
    positions = SIZES[arguments.model].get("n_positions", 1024)
    arguments.seq_length = arguments.seq_length or positions
    if arguments.seq_length > positions:
        parser.error(f"--seq_length={arguments.seq_length}: {arguments.model} takes {positions}")
    try:
        arguments.config = json.loads(Path(config_path).read_text())
    except json.JSONDecodeError as error:
        parser.error(f"--deepspeed_config={config_path} is no JSON: {error}")
    if "optimizer" not in arguments.config:
        parser.error(f'{config_path} has no "optimizer"; add one, as in configs/')
    scheduler = arguments.config.get("scheduler", {}).get("params", {})
    arguments.warmup_steps = scheduler.get("warmup_num_steps")
    arguments.max_steps = arguments.max_steps or scheduler.get("total_num_steps")
    if arguments.max_steps is None:
        parser.error("--max_steps is needed: the JSON's scheduler has no total_num_steps")
    return arguments


def check_batch_size(config: dict[str, Any], world_size: int) -> None:
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


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by names such as ``optimizer.params.lr``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


class Interruption:
    """Turns Ctrl-C and SIGTERM into a flag, so that the step at hand is finished and saved."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def restore(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


class Run:
    """One pre-training run on all ranks.

    Args:
        arguments: what :func:`parse_arguments` returned.

    Raises:
        SetupError: on all ranks, where text, settings or checkpoint do not fit.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output_dir)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(get_accelerator().current_device_name())
        check_batch_size(arguments.config, self.world_size)
        # The first rank fills the caches of tokenizer and sequences, then the first of each other
        # node, whose folders may be its own; the rest then find them.
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        turns = (self.rank == 0, first and self.rank > 0, not first and self.rank > 0)
        prepared = [on_ranks(turn, lambda: Sequences(arguments)) for turn in turns]
        data = next(mine for mine in prepared if mine is not None)
        self.data = data
        fingerprints: list[Any] = [None] * self.world_size
        dist.all_gather_object(fingerprints, data.fingerprint)
        if len(set(fingerprints)) > 1:
            raise SetupError(
                f"the ranks have read different text or trained different tokenizers "
                f"(fingerprints {sorted(set(fingerprints))}): is Python's standard library the "
                "same on all nodes? Name the text by --text or --dataset."
            )
        config = model_config(arguments.model, data.tokenizer, arguments.dropout)
        model = make_model(config, arguments.seed)
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model), config=arguments.config
        )
        # DeepSpeed makes the group of ZeRO's collectives, and ALTO's, with PyTorch's own timeout.
        dist.distributed_c10d._set_pg_timeout(
            timedelta(seconds=arguments.timeout), self.engine.seq_data_parallel_group
        )
        self.identity = {
            "model": arguments.model,
            "seq_length": arguments.seq_length,
            "seed": arguments.seed,
            "train_batch_size": self.engine.train_batch_size(),
            "dropout": arguments.dropout,
            "validation_sequences": arguments.validation_sequences,
            # Of a tokenizer that is trained; a resumed run goes on with it and trains none.
            "vocab_size": None if arguments.tokenizer else arguments.vocab_size,
            "tokenizer_documents": None if arguments.tokenizer else arguments.tokenizer_documents,
            **{key: arguments.config[key] for key in DECISIVE if key in arguments.config},
            "gradient_clipping": self.engine.gradient_clipping(),
            "bf16": self.engine.bfloat16_enabled(),
            "fp16": self.engine.fp16_enabled(),
            "zero_optimization.stage": self.engine.zero_optimization_stage(),
            "data": data.fingerprint,
            "ranks": self.world_size,
        }
        self.step = self._resume()
        self.report = Report(self.folder, self.step, arguments.max_steps, self.rank == 0)

    @property
    def checkpoints(self) -> Path:
        """Folder of DeepSpeed's checkpoints."""
        return self.folder / "checkpoints"

    def _resume(self) -> int:
        """Load the latest checkpoint; return the number of steps it has done, 0 without one."""
        found = [(self.checkpoints / "latest").is_file()]
        dist.broadcast_object_list(found, src=0)
        if not found[0]:
            return 0
        on_ranks(self.rank == 0, self._check_identity)
        path, state = self.engine.load_checkpoint(str(self.checkpoints))
        if path is None:
            raise SetupError(
                f"the checkpoint that {self.checkpoints}/latest names cannot be loaded; write "
                "another folder's name into that file, or remove it to start anew."
            )
        return state["step"]

    def _check_identity(self) -> None:
        """Refuse to go on with a run that would not be the same one, before anything is loaded."""
        then = flat(json.loads((self.folder / "run.json").read_text()))
        now = flat(self.identity)
        changed = [
            f"{key}={then.get(key)}, now {now.get(key)}"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
        ]
        if changed:
            raise SetupError(
                f"the run in {self.folder} was started with {'; '.join(changed)}. Use the same "
                "settings to resume it, or another --output_dir to start anew."
            )

    def save(self) -> None:
        """Write a checkpoint and remove older ones. All ranks must call this together."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = self.folder / "run.json.new"
            new.write_text(json.dumps(self.identity, indent=2) + "\n")
            new.replace(self.folder / "run.json")
        self.engine.save_checkpoint(
            str(self.checkpoints), tag=f"step{self.step:07d}", client_state={"step": self.step}
        )
        dist.barrier()
        if self.rank == 0:
            newest_last = sorted(self.checkpoints.glob("step*"), key=lambda p: p.stat().st_mtime)
            for old in newest_last[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)

    def train(self) -> bool:
        """Train to the last step; False where a signal ended the run before it."""
        arguments, engine = self.arguments, self.engine
        interruption = Interruption()
        batch_size, gas = engine.train_batch_size(), engine.gradient_accumulation_steps()
        batches = self.data.training_batches(self.step, batch_size, gas, self.rank, self.world_size)
        saved = self.step
        while self.step < arguments.max_steps:
            began = time.perf_counter()
            row = self._train_step(batches, gas)
            # What all ranks must know of each other: the loss of each, and whether one is to stop.
            shared = torch.tensor([row["loss"], float(interruption.requested)], device=self.device)
            dist.all_reduce(shared)
            row["loss"] = shared[0].item() / self.world_size
            stop = shared[1].item() > 0
            tokens = batch_size * arguments.seq_length
            row["tokens"] = self.step * tokens
            row["tokens_per_second"] = tokens / (time.perf_counter() - began)
            if self._evaluates_now():
                loss = self.evaluate()
                row |= {"val_loss": loss, "val_ppl": perplexity(loss)}
            self.report.step(row)
            if "val_ppl" in row:
                self.report.say(
                    f"step {self.step}: held-out loss {row['val_loss']:.4f}, "
                    f"perplexity {row['val_ppl']:.2f}"
                )
            if stop or self.step % arguments.save_interval == 0 or self.step == arguments.max_steps:
                self.save()
                saved = self.step
            if stop and self.step < arguments.max_steps:
                self.report.say(f"Stopped after step {saved}; the same command goes on from there.")
                self.report.close()
                return False
        self.report.close()
        interruption.restore()
        return True

    def _train_step(self, batches: Any, gas: int) -> dict[str, Any]:
        """One optimizer step; returns what this rank knows of it."""
        # Dropout depends on step and rank alone, so that a resumed run repeats it.
        torch.manual_seed(self.arguments.seed + self.step * self.world_size + self.rank)
        lr = self.engine.get_lr()[0]
        loss = torch.zeros((), device=self.device)
        for _ in range(gas):
            tokens = next(batches).to(self.device)
            micro_loss = self.engine(input_ids=tokens, labels=tokens).loss
            self.engine.backward(micro_loss)
            self.engine.step()
            loss += micro_loss.detach().float() / gas
        self.step += 1
        row = {"step": self.step, "tokens": 0, "loss": loss.item(), "lr": lr}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            row["grad_norm"] = float(norm)
        return row

    def _evaluates_now(self) -> bool:
        moments = (self.arguments.warmup_steps, self.arguments.max_steps)
        return self.step in moments or self.step % self.arguments.eval_interval == 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss per token over all held-out sequences, in nats; the same on every rank.

        All ranks must call this together. Under ZeRO-3 a forward pass is a collective, so a rank
        that has no sequence left repeats one and does not count it.
        """
        self.engine.eval()
        size = self.engine.train_micro_batch_size_per_gpu()
        mine: Tensor = self.data.validation[self.rank :: self.world_size]
        rounds = -(-len(self.data.validation) // (self.world_size * size))
        sums = torch.zeros(2, dtype=torch.float64)
        for number in range(rounds):
            batch = mine[number * size : (number + 1) * size]
            tokens = (batch if len(batch) else self.data.validation[:1]).to(self.device)
            loss = self.engine(input_ids=tokens, labels=tokens).loss
            predicted = len(batch) * (tokens.shape[1] - 1)
            sums += torch.tensor([loss.item() * predicted, predicted], dtype=torch.float64)
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        self.engine.train()
        return (sums[0] / sums[1]).item()

    def finish(self) -> None:
        """Save the model, draw the curves, and print the final perplexity. On all ranks."""
        save_model(self.engine, self.data.tokenizer, self.folder / "model")
        loss = self.evaluate()
        self.report.draw()
        if self.rank == 0:
            print(
                f"Final held-out perplexity {perplexity(loss):.2f} after {self.step} steps; "
                f"model in {self.folder / 'model'}, curves in {self.folder / 'curves.png'}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``pretrain_gpt2.py``."""
    arguments = parse_arguments(argv)
    if get_accelerator().device_name() == "cpu":
        # Compiling DeepSpeed's shared-memory collectives takes longer than a small run; gloo
        # does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        init_distributed(timedelta(seconds=arguments.timeout))
        # Before any collective: with NCCL, all ranks of a node would else use its first GPU.
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        run = Run(arguments)
    except SetupError as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"pretrain_gpt2: {error}", file=sys.stderr)
        sys.exit(2)
    finished = run.train()
    if finished:
        run.finish()
    dist.destroy_process_group()
    sys.exit(0 if finished else INTERRUPTED)
