"""What may a user set of a pre-training run, and which values are refused?

The fields have the names of the command's options. Whoever makes the settings in Python, not from
a command line, gets the same checks.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

# The sizes of GPT-2 (Radford et al., 2019) by their names on the Hugging Face hub, and one that
# learns on a CPU within minutes.
SIZES: dict[str, dict[str, int]] = {
    "gpt2-tiny": {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 128},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 1024},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20, "n_positions": 1024},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024},
}
# What a model's config.json says of its architecture; the rest is the run's affair.
NEEDED = ("n_layer", "n_embd", "n_head")
ARCHITECTURE: dict[str, type] = {
    **dict.fromkeys((*NEEDED, "n_positions", "n_inner"), int),
    **dict.fromkeys(("layer_norm_epsilon", "initializer_range"), float),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx"), bool),
    **dict.fromkeys(("reorder_and_upcast_attn", "tie_word_embeddings"), bool),
    "activation_function": str,
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is trained.

    Attributes:
        model: a name of :data:`SIZES`, or the config.json of a GPT-2 in Hugging Face's format, of
            which :data:`ARCHITECTURE` is read.
        seq_length: tokens in a sequence; None for as many as the model has positions.
        dropout: probability of GPT-2's three kinds of dropout.
        compile: compile the model and its loss; None where that pays: see
            :func:`alto_ds.pretrain.setup.compiles`.
        activation_checkpointing: compute each block again for its gradient, to save memory.
        n_layer: blocks; None for those of ``model``, as the next two.
        n_embd: hidden size.
        n_head: attention heads.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    seq_length: int | None = None
    dropout: float = 0.0
    compile: bool | None = None
    activation_checkpointing: bool = False
    n_layer: int | None = None
    n_embd: int | None = None
    n_head: int | None = None

    def __post_init__(self) -> None:
        sizes = {name: self.architecture[name] for name in (*NEEDED, "n_positions")}
        _at_least(1, **sizes)
        if sizes["n_embd"] % sizes["n_head"]:
            raise ValueError(
                f"--n_embd={sizes['n_embd']} must be a multiple of --n_head={sizes['n_head']}"
            )
        _at_least(2, seq_length=self.seq_length)  # one token to predict the next from
        _is_number(dropout=self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout={self.dropout} must be in [0, 1)")
        if self.length > self.positions:
            raise ValueError(
                f"--seq_length={self.length}: {self.model} takes {self.positions} tokens at most"
            )

    @functools.cached_property
    def architecture(self) -> dict[str, Any]:
        """The model's part of :data:`ARCHITECTURE`, all of :data:`SIZES`'s keys among it."""
        given = {name: getattr(self, name) for name in NEEDED}
        size = _read_architecture(self.model) if self.model not in SIZES else SIZES[self.model]
        return size | {name: value for name, value in given.items() if value is not None}

    @property
    def identity(self) -> str | dict[str, Any]:
        """The model's name where its architecture is that of :data:`SIZES`, else that."""
        names = [name for name, size in SIZES.items() if size == self.architecture]
        return names[0] if names else self.architecture

    @property
    def positions(self) -> int:
        """Tokens that the model takes at most."""
        return self.architecture["n_positions"]

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.positions if self.seq_length is None else self.seq_length


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which text is trained on, and how it becomes tokens.

    Attributes:
        data: prefix of a prepared text, or weights and prefixes in turn: 0.3 A 0.7 B.
        verify_data: compare the checksums of a prepared text, too; sizes are always compared.
        text: files; none of ``data``, ``text`` and ``dataset`` is Python's own standard library.
        encoding: of the files that ``text`` names.
        dataset: hub name, local folder or .jsonl file for the ``datasets`` library.
        dataset_config: configuration of the dataset on the hub.
        dataset_split: split of the dataset.
        text_column: column of the dataset with the text.
        streaming: read the dataset while training and do not download it first.
        validation_fraction: part of the documents that is held out, in (0, 1).
        validation_sequences: held-out sequences at most.
        tokenizer: hub name or folder; None for that of ``data``, or to train a byte-level BPE on
            the text.
        vocab_size: tokens of the tokenizer that is trained.
        tokenizer_documents: documents that it is trained on, at most.

    Raises:
        ValueError: a value is out of its range, or two do not go together.
    """

    data: Sequence[str] = ()
    verify_data: bool = False
    text: Sequence[Path] = ()
    encoding: str = "utf-8"
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    validation_fraction: float = 0.02
    validation_sequences: int = 2000
    tokenizer: str | None = None
    vocab_size: int = 4096
    tokenizer_documents: int = 100_000

    def __post_init__(self) -> None:
        if self.data and (self.text or self.dataset):
            raise ValueError(
                "--data names prepared text, and --text or --dataset other text; give one of them"
            )
        if self.verify_data and not self.data:
            raise ValueError("--verify_data goes with --data; leave it out for other text")
        _ = self.blend
        if self.text and self.dataset:
            raise ValueError("--text and --dataset both name text; give one of them")
        if self.encoding != "utf-8" and not self.text:
            raise ValueError(f"--encoding={self.encoding} is that of --text; name its files")
        try:
            "text".encode(self.encoding)
        except (LookupError, ValueError):
            raise ValueError(
                f"--encoding={self.encoding} is none of text that Python knows; write utf-8, "
                "utf-16 or latin-1, for example"
            ) from None
        if self.streaming and not self.dataset:
            raise ValueError("--streaming goes with --dataset; leave it out for files")
        _at_least(
            1,
            validation_sequences=self.validation_sequences,
            tokenizer_documents=self.tokenizer_documents,
        )
        _at_least(257, vocab_size=self.vocab_size)  # the bytes and end of text
        for name in ("dataset", "dataset_split", "text_column", "tokenizer"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name} is empty; write a name, or leave the option out")
        _is_number(validation_fraction=self.validation_fraction)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"--validation_fraction={self.validation_fraction} must be in (0, 1)")

    @property
    def blend(self) -> dict[str, Fraction]:
        """The weight of each prefix in ``data``, 1 in all."""
        words = list(self.data)
        if len(words) == 1:
            words = ["1", *words]
        try:
            weights = [Fraction(word) for word in words[::2]]
        except (ValueError, ZeroDivisionError):
            weights = []
        prefixes = words[1::2]
        if len(weights) != len(prefixes) or any(weight <= 0 for weight in weights):
            raise ValueError(
                f"--data={' '.join(self.data)} must be a prefix, or weights above 0 and prefixes "
                "in turn, such as 0.3 data/books 0.7 data/web"
            )
        if len(set(prefixes)) < len(prefixes):
            raise ValueError(f"--data={' '.join(self.data)} names a prefix twice; add the weights")
        total = sum(weights)
        return {prefix: w / total for prefix, w in zip(prefixes, weights, strict=True)}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long a run takes and what it leaves.

    Attributes:
        output_dir: folder for checkpoints, metrics and the model.
        max_steps: steps to take; None for ``total_num_steps`` of the JSON's scheduler.
        eval_interval: steps between evaluations.
        save_interval: steps between checkpoints.
        keep_checkpoints: the newest that stay.
        keep_every: checkpoints of every so many steps stay for ever; None for none.
        save_minutes: minutes after which a checkpoint is written besides; infinite for never.
        max_skipped_steps: steps in a row that DeepSpeed may skip before the run ends. The default
            lets a loss scale of 2**32 fall to 1.
        trust_ratios_by_layer: record the trust ratio of each layer at evaluations, too.
        profile: steps of rank 0 to record for ``torch.profiler``, after the first ones; None for
            none.
        fresh_states: start the optimizer's states anew where the run goes on, once; optimizer and
            scheduler may then be others. Weights, number of steps and place in the data stay.
        seed: of weights, order of the data and dropout.
        timeout: seconds a rank waits for the others before it ends with an error. The command's
            own default follows DEEPSPEED_TIMEOUT.

    Raises:
        ValueError: a value is out of its range.
    """

    output_dir: Path
    max_steps: int | None = None
    eval_interval: int = 100
    save_interval: int = 100
    keep_checkpoints: int = 2
    keep_every: int | None = None
    save_minutes: float = math.inf
    max_skipped_steps: int = 50
    trust_ratios_by_layer: bool = False
    profile: int | None = None
    fresh_states: bool = False
    seed: int = 1234
    timeout: int = 600

    def __post_init__(self) -> None:
        _at_least(
            1,
            max_steps=self.max_steps,
            eval_interval=self.eval_interval,
            save_interval=self.save_interval,
            keep_checkpoints=self.keep_checkpoints,
            keep_every=self.keep_every,
            profile=self.profile,
            max_skipped_steps=self.max_skipped_steps,
            timeout=self.timeout,
        )
        _at_least(0, seed=self.seed)
        # What PyTorch's generators and timeouts take.
        _at_most(2**62, seed=self.seed, max_steps=self.max_steps)
        _at_most(10**9, timeout=self.timeout)
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"--output_dir={self.output_dir} is a file; name a folder")
        if not self.save_minutes > 0:
            raise ValueError(f"--save_minutes={self.save_minutes} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of one run.

    Attributes:
        model: which model.
        data: on which text.
        run: how long.
        deepspeed_config: DeepSpeed's JSON as parsed.

    Raises:
        ValueError: the JSON has no optimizer, or nothing says how many steps to take.
    """

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    deepspeed_config: dict[str, Any]

    def __post_init__(self) -> None:
        if "optimizer" not in self.deepspeed_config:
            raise ValueError('--deepspeed_config has no "optimizer"; add one, as in configs/')
        total = self._scheduler.get("total_num_steps")
        if self.run.max_steps is None and not (type(total) is int and total > 0):
            raise ValueError(
                "--max_steps is needed: the JSON's scheduler has no total_num_steps that is a "
                f"number of steps, but {total!r}"
            )

    @property
    def steps(self) -> int:
        """Steps to take, those of earlier starts of the run included."""
        given = self.run.max_steps
        return self._scheduler["total_num_steps"] if given is None else given

    @property
    def warmup_steps(self) -> int | None:
        """Steps of the schedule's warm-up, None without one."""
        return self._scheduler.get("warmup_num_steps")

    @property
    def _scheduler(self) -> Mapping[str, Any]:
        section = self.deepspeed_config.get("scheduler")
        params = section.get("params") if isinstance(section, dict) else None
        return params if isinstance(params, dict) else {}


def _read_architecture(path: str) -> dict[str, Any]:
    """:data:`ARCHITECTURE` in a model's config.json."""
    if not path.endswith(".json"):
        raise ValueError(f"--model={path} must be one of {', '.join(SIZES)}, or a config.json")
    try:
        config = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--model={path} cannot be read as JSON: {error}") from None
    kind = config.get("model_type", "gpt2") if isinstance(config, dict) else "no object"
    if kind != "gpt2":
        raise ValueError(f"--model={path} is of {kind}; name the config.json of a GPT-2")
    missing = [name for name in NEEDED if name not in config]
    if missing:
        raise ValueError(f"--model={path} has no {missing[0]}; write a whole number for it")
    # A value that is null stands for the default, too.
    given = {name: config[name] for name in ARCHITECTURE if config.get(name) is not None}
    for name, value in given.items():
        kind = ARCHITECTURE[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"--model={path}: {name}={value!r} must be of type {kind.__name__}")
    if given.get("activation_function", "gelu_new") not in ACT2FN:
        raise ValueError(
            f"--model={path}: activation_function={given['activation_function']!r} is not known to "
            'transformers; GPT-2\'s is "gelu_new"'
        )
    return {"n_positions": 1024} | given


def _at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and type(value) is not int:
            raise ValueError(f"--{name}={value!r} must be a whole number")
        if value is not None and value < minimum:
            raise ValueError(f"--{name}={value} must be at least {minimum}")


def _at_most(maximum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value > maximum:
            raise ValueError(f"--{name}={value} must be at most {maximum}")


def _is_number(**values: float) -> None:
    for name, value in values.items():
        if type(value) not in (int, float):
            raise ValueError(f"--{name}={value!r} must be a number")
