"""Tokens a second of the main job, with ALTO and with AdamW, of nanoGPT and of Hugging Face.

The same GPT-2, micro batch, sequence and accumulation on two CPU ranks. All contenders are started
once, as plain processes, and stopped (SIGSTOP) when they are warm; then they take turns: one goes
on for some steps, of which the first, in which it was stopped, does not count.

nanoGPT (https://github.com/karpathy/nanoGPT) is cloned, or read from ``--nanogpt``, a clone of it
that may be a bare one. Its train.py trains on several ranks with CUDA only, so the lines that name
a device are changed in a copy; its data are random tokens. Hugging Face's example run_clm is its
Trainer around a model and a text: see ``hf_trainer``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alto_ds.pretrain.settings import SIZES
from tests.benchmarks.contenders import ratio, write
from tests.launcher import CPU, ROOT

NANOGPT = "https://github.com/karpathy/nanoGPT"
RANKS = 2
PATIENCE = 400  # seconds for a start, in which the model may be compiled
YARDSTICK = "nanoGPT, compiled"
PHASES = "phases.json"
# What trains on a GPU only, and what stands there for gloo on CPUs.
ON_CPU = {
    "device = f'cuda:{ddp_local_rank}'": "device = 'cpu'",
    "torch.cuda.set_device(device)": "pass",
    "DDP(model, device_ids=[ddp_local_rank])": "DDP(model)",
}


class Case(NamedTuple):
    """What all contenders train in the same way.

    Attributes:
        model: name of its size.
        vocabulary: rows of its embedding.
        length: tokens in a sequence.
        micro: sequences in a micro batch.
        accumulation: micro batches of a rank in a step.
        steps: that a turn takes.
    """

    model: str
    vocabulary: int
    length: int
    micro: int
    accumulation: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.length * self.micro * self.accumulation * RANKS


CASES = (
    Case("gpt2-tiny", 4096, 128, 8, accumulation=1, steps=40),
    Case("gpt2-tiny", 4096, 128, 8, accumulation=8, steps=8),
    Case("gpt2", 50304, 256, 1, accumulation=1, steps=2),
    Case("gpt2", 50304, 256, 1, accumulation=8, steps=1),
)


class Job:
    """A contender: its ranks, and a file to which it adds a line for each step.

    Args:
        arguments: of Python.
        folder: where it runs and prints to.
        file: which has a line for each step.
        mark: is in such a line.
        checkout: of this repository.
    """

    def __init__(
        self, arguments: list[str], folder: Path, file: Path, mark: str, checkout: Path = ROOT
    ) -> None:
        self._file, self._mark = file, mark.encode()
        self._phases = folder / PHASES
        self.phases: Counter[str] = Counter()  # seconds of the steps that count
        self._log = folder / "log.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = CPU | {"PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        common |= {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._ranks = []
        for rank in map(str, range(RANKS)):
            log = self._log if rank == "0" else folder / f"log{rank}.txt"
            with log.open("w") as output:
                self._ranks.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        cwd=folder,
                        env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all ranks and the processes that they have started."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, number)

    def turn(self, steps: int) -> float:
        """Seconds of so many steps, after one that does not count."""
        before = self._lines()
        self.send(signal.SIGCONT)
        began = self._wait(before + 1)
        self.phases.subtract(self._read_phases())
        seconds = self._wait(before + 1 + steps) - began
        self.phases.update(self._read_phases())
        self.send(signal.SIGSTOP)
        return seconds

    def _read_phases(self) -> dict[str, float]:
        return json.loads(self._phases.read_text()) if self._phases.exists() else {}

    def close(self) -> None:
        self.send(signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()

    def _wait(self, lines: int) -> float:
        deadline = time.monotonic() + PATIENCE
        while self._lines() < lines:
            if time.monotonic() > deadline or any(r.poll() is not None for r in self._ranks):
                raise RuntimeError(self._log.read_text()[-4000:])
            time.sleep(0.001)
        return time.perf_counter()

    def _lines(self) -> int:
        return self._file.read_bytes().count(self._mark) if self._file.exists() else 0


def main_job(
    case: Case,
    optimizer: dict[str, Any],
    folder: Path,
    given: argparse.Namespace,
    checkout: Path | None = None,
) -> Job:
    """The main job under ZeRO-1, with a shipped configuration but for the optimizer.

    Args:
        case: what it trains.
        optimizer: its entry in the configuration.
        folder: where it runs.
        given: the command line.
        checkout: of this repository, where it is another than this one.
    """
    folder.mkdir()
    config = json.loads((ROOT / "configs/gpt2-tiny/zero1.json").read_text())
    config["train_batch_size"] = case.micro * case.accumulation * RANKS
    config["train_micro_batch_size_per_gpu"] = case.micro
    config["optimizer"] = optimizer
    config["zero_optimization"] |= json.loads(given.zero)
    # After the warm-up of the learning rate it would evaluate.
    config["scheduler"]["params"] |= {"warmup_num_steps": 10**6, "total_num_steps": 10**7}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = folder / "tokenizer"
    make_tokenizer(case.vocabulary).save_pretrained(tokenizer)
    values = {
        **{"deepspeed_config": "config.json", "model": case.model, "output_dir": "run"},
        **{"tokenizer": tokenizer, "seq_length": case.length, "max_steps": 10**6},
        **{"eval_interval": 10**6, "save_interval": 10**6, "timeout": 10**5},
    }
    pairs = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    file = folder / "run/metrics.jsonl"
    pairs += given.options.split() if checkout is None else []
    module = ["-m"]
    if given.phases:
        module = [str(Path(__file__).with_name("phases.py")), str(folder / PHASES)]
    return Job([*module, "alto_ds.pretrain", *pairs], folder, file, "\n", checkout or ROOT)


def make_tokenizer(vocabulary: int) -> Any:
    """A byte-level tokenizer of so many tokens: the bytes, end of text, and pairs of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: vocabulary - len(letters) - 1]
    words = [*letters, *(a + b for a, b in pairs), "<|endoftext|>"]
    found = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|endoftext|>")


def nanogpt(case: Case, source: str, folder: Path, compiled: bool) -> Job:
    """nanoGPT's train.py under DDP."""
    data = folder / "data/random"
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        call = ["git", "-C", source, "show", f"HEAD:{name}"]
        text = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        if name == "train.py":
            for line, other in ON_CPU.items():
                if line not in text:
                    raise RuntimeError(f"nanoGPT's train.py has changed: no {line}")
                text = text.replace(line, other)
        (folder / name).write_text(text)
    tokens = np.random.default_rng(1234).integers(case.vocabulary, size=1 << 20, dtype=np.uint16)
    tokens.tofile(data / "train.bin")
    tokens[: 1 << 16].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": case.vocabulary}))
    size = SIZES[case.model]
    values = {
        **{"dataset": "random", "backend": "gloo", "device": "cpu", "dtype": "float32"},
        **{"n_layer": size["n_layer"], "n_embd": size["n_embd"], "n_head": size["n_head"]},
        **{"bias": True, "block_size": case.length, "batch_size": case.micro},
        **{"gradient_accumulation_steps": case.accumulation * RANKS, "compile": compiled},
        **{"eval_iters": 1, "eval_interval": 10**9, "max_iters": 10**9},
    }
    options = [f"--{key}={value}" for key, value in values.items()]
    return Job(["train.py", *options], folder, folder / "log.txt", "iter ")


def trainer(case: Case, folder: Path) -> Job:
    """Hugging Face's Trainer under DDP."""
    folder.mkdir()
    numbers = (case.vocabulary, case.length, case.micro, case.accumulation)
    arguments = ["-m", "tests.benchmarks.hf_trainer", case.model, *map(str, numbers)]
    return Job(arguments, folder, folder / "log.txt", "'loss'")


@contextlib.contextmanager
def contenders(case: Case, folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Job]]:
    """All contenders, warm and stopped, by name."""
    source = given.nanogpt
    params = json.loads((ROOT / "configs/gpt2-medium/paper_alto.json").read_text())["optimizer"]
    adamw = {"type": "AdamW", "params": {"lr": 6e-4, "weight_decay": 0.1, "torch_adam": True}}
    makers = {
        "nanoGPT, eager": lambda path: nanogpt(case, source, path, False),
        YARDSTICK: lambda path: nanogpt(case, source, path, True),
        "Trainer, compiled": lambda path: trainer(case, path),
        "main job, ALTO": lambda path: main_job(case, params, path, given),
        "main job, AdamW": lambda path: main_job(case, adamw, path, given),
    }
    if given.before is not None:
        makers["main job, ALTO, before"] = lambda path: main_job(
            case, params, path, given, given.before.resolve()
        )
    makers = {name: make for name, make in makers.items() if name not in given.without}
    jobs: dict[str, Job] = {}
    try:
        for number, (name, make) in enumerate(makers.items()):
            jobs[name] = make(folder / str(number))
            jobs[name].turn(max(case.steps, 3))
            jobs[name].phases.clear()
        yield jobs
    finally:
        for job in jobs.values():
            job.close()


def measure(case: Case, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender: medians over the rounds, ratios those of each round."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contenders(case, Path(folder), given) as jobs,
    ):
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(given.repeats):
            for name, job in jobs.items():
                times[name].append(job.turn(case.steps) / case.steps)
                print(f"{name}: {times[name][-1]:.3f} s a step", flush=True)
    return [
        {
            **{"model": case.model, "accumulation": case.accumulation, "contender": name},
            "tokens a second": case.tokens / statistics.median(seconds),
            "ms a step": 1e3 * statistics.median(seconds),
            **({f"of {YARDSTICK}": ratio(times[YARDSTICK], seconds)} if YARDSTICK in times else {}),
            **{
                f"{phase}, ms": 1e3 * spent / case.steps / given.repeats
                for phase, spent in jobs[name].phases.items()
            },
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("report")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", help="taken from __main__; the ranks are CPU ones")
    parser.add_argument("--nanogpt", help="a clone of it (default: clone it now)")
    parser.add_argument("--case", type=int, help="number of the only one to measure")
    parser.add_argument("--options", default="", help="for the main job, such as --no-compile")
    parser.add_argument("--before", type=Path, help="another checkout, whose main job takes part")
    parser.add_argument("--zero", default="{}", help="more in zero_optimization of the main job")
    parser.add_argument("--phases", action="store_true", help="of the main job's steps, as well")
    parser.add_argument("--without", nargs="*", default=[], help="names of contenders to leave out")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so end the contenders as well
    with tempfile.TemporaryDirectory() as folder:
        if given.nanogpt is None:
            given.nanogpt = folder
            subprocess.run(["git", "clone", "--bare", "--depth=1", NANOGPT, folder], check=True)
        rows: list[dict[str, Any]] = []
        for case in CASES if given.case is None else CASES[given.case : given.case + 1]:
            rows += measure(case, given)
            print(*rows, sep="\n", flush=True)
    write(given.report, rows)


if __name__ == "__main__":
    main()
