"""The task of pre-training GPT-2 on text, with the main job's model, tokenizer and order of data.

A run with a seed has the sequences, in their order, and the initial weights that the main job has
with that seed on the prepared training text and tokenizer, the documents that it holds out left
aside.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from alto_ds.compare.spec import TextSettings
from alto_ds.compare.task import PARTS, Parameters
from alto_ds.files import replace_text, replacing
from alto_ds.pretrain.data.order import micro_batches, shuffled
from alto_ds.pretrain.data.sequences import digest
from alto_ds.pretrain.data.streamed import Tokens, joined
from alto_ds.pretrain.data.text import TEXT, documents
from alto_ds.pretrain.data.tokenizer import load_tokenizer, make_tokenizer
from alto_ds.pretrain.metrics import perplexity
from alto_ds.pretrain.model import make_model, model_config, parameter_groups
from alto_ds.pretrain.settings import DataSettings

DOCUMENTS = 1000  # packed into sequences at once, as the main job does
RECORD = "prepared.json"


class TextTask:
    """See :class:`alto_ds.compare.task.Task`.

    Args:
        settings: of the task.
        folder: where :func:`prepare` has put the data.
    """

    headline = "perplexity"

    def __init__(self, settings: TextSettings, folder: Path) -> None:
        self._settings, self._folder = settings.model_settings, folder
        self._compile = settings.compile
        self.tokens_per_sequence = self._settings.length

    def model(self, seed: int) -> nn.Module:
        """See :meth:`Task.model`."""
        tokenizer = load_tokenizer(str(self._folder / "tokenizer"))
        model = make_model(model_config(self._settings, tokenizer), seed)
        if self._compile:
            model.compile(dynamic=False)
        return model

    def parameters(self, model: nn.Module) -> Parameters:
        """See :meth:`Task.parameters`."""
        decayed, undecayed = parameter_groups(model)
        named = list(zip(decayed["param_names"], decayed["params"], strict=True))
        return Parameters(
            hidden=[param for name, param in named if ".h." in name],
            outer=[param for name, param in named if ".h." not in name],
            undecayed=undecayed["params"],
        )

    def batches(self, seed: int, batch_size: int, micro_batch_size: int) -> Iterator[Tensor]:
        """See :meth:`Task.batches`. Yields ``[sequences, seq_length]`` tokens, on the CPU."""
        sequences = np.load(self._folder / _of_seed(seed), mmap_mode="r")
        order = shuffled(len(sequences), 0, seed)
        accumulation = batch_size // micro_batch_size

        def read(index: int) -> Tensor:
            return torch.from_numpy(sequences[index].astype(np.int64))

        return micro_batches(order, read, batch_size, accumulation, 0, 1)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """See :meth:`Task.loss`; in nats per predicted token."""
        tokens = batch.to(_device(model))
        return model(tokens, tokens)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str, micro_batch_size: int) -> dict[str, float]:
        """See :meth:`Task.evaluate`; mean loss per predicted token and its perplexity."""
        sequences = torch.from_numpy(np.load(self._folder / f"{part}.npy").astype(np.int64))
        total = torch.zeros((), dtype=torch.float64, device=_device(model))
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            for batch in sequences.split(micro_batch_size):
                total += self.loss(model, batch).double() * len(batch)
        model.train()
        loss = (total / len(sequences)).item()
        return {"loss": loss, "perplexity": perplexity(loss)}


def prepare(settings: TextSettings, seeds: Sequence[int], folder: Path) -> str:
    """Split, tokenize and pack the text once for all runs; nothing is done where it is there.

    Args:
        settings: of the task.
        seeds: of all runs.
        folder: for the parts as ``train.jsonl`` and so on, which the main job reads by
            ``--dataset``, the tokenizer, and sequences as arrays.

    Returns:
        A fingerprint of model, text and tokenizer, which tells runs of other tasks apart.

    Raises:
        ValueError: a file cannot be used, or there is too little text.
    """
    _check_compiler(settings)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(settings)
    source = digest(parts, settings.model_settings.architecture, _without_paths(settings))
    record = folder / RECORD
    made = json.loads(record.read_text()) if record.exists() else {}
    if made.get("source") == source and {*seeds} <= {*made["seeds"]}:
        return made["fingerprint"]
    record.unlink(missing_ok=True)
    for name, texts in parts.items():
        lines = "".join(json.dumps({TEXT: text}) + "\n" for text in texts)
        replace_text(folder / f"{name}.jsonl", lines)
    data = DataSettings(
        dataset=str(folder / "train.jsonl"),
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
    )
    training = documents(data)
    tokenizer = make_tokenizer(data, training, source, folder / "tokenizer", resumed=False)
    tokenizer.save_pretrained(folder / "tokenizer")  # also one that was named
    length, most = settings.model_settings.length, settings.evaluation_sequences
    for name in PARTS:
        rows = _packed(parts[name], tokenizer, length)
        _save(folder / f"{name}.npy", rows[:: max(len(rows) // most, 1)][:most], name)
    for seed in seeds:
        rows = _training_sequences(training, data, tokenizer, length, seed)
        _save(folder / _of_seed(seed), rows, "train")
    fingerprint = digest(source, tokenizer.backend_tokenizer.to_str())
    made = {"source": source, "seeds": [*seeds], "fingerprint": fingerprint}
    replace_text(record, json.dumps(made))  # last, so that data without it is incomplete
    return fingerprint


def _check_compiler(settings: TextSettings) -> None:
    cxx = os.environ.get("CXX", "g++")
    if settings.compile and shutil.which(cxx) is None:
        raise ValueError(
            f"task.compile=true needs the C++ compiler {cxx}; install one, name it in CXX, or "
            "write false"
        )


def _parts(settings: TextSettings) -> dict[str, list[str]]:
    """The documents of each part, up to 20,000 characters each."""
    if settings.files:
        texts = _texts(settings, settings.files)
        test = max(round(len(texts) * settings.test_fraction), 1)
        validation = max(round(len(texts) * settings.validation_fraction), 1)
        first = len(texts) - test - validation
        found = {
            "train": texts[: max(first, 0)],
            "validation": texts[max(first, 0) : len(texts) - test],
            "test": texts[len(texts) - test :],
        }
    else:
        names: Mapping[str, Any] = {name: getattr(settings, name) for name in ("train", *PARTS)}
        found = {name: _texts(settings, files) for name, files in names.items()}
    if len(found["train"]) < 2:
        raise ValueError(
            f"task has {len(found['train'])} document(s) of up to 20,000 characters to train on; "
            "at least 2 are needed; give more text"
        )
    return found


def _texts(settings: TextSettings, files: Sequence[str]) -> list[str]:
    return list(documents(settings.data(files))[TEXT])


def _packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tokens:
    """``[sequences, length]`` tokens of the documents; the rest of them is dropped."""
    tokens = np.array(joined(texts, tokenizer), dtype=np.int32)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def _training_sequences(
    training: Any,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    seed: int,
) -> Tokens:
    """The sequences that the main job trains on with a seed, in the order in which it numbers them.

    Args:
        training: ``datasets.Dataset`` of all documents to train on.
        data: settings with which the main job reads it.
        tokenizer: of the comparison.
        length: tokens in a sequence.
        seed: by which the main job holds out some documents, and mixes the others.
    """
    kept = training.train_test_split(data.validation_fraction, seed=seed)["train"][TEXT]
    blocks = [kept[start : start + DOCUMENTS] for start in range(0, len(kept), DOCUMENTS)]
    return np.concatenate([_packed(block, tokenizer, length) for block in blocks])


def _save(path: Path, rows: Tokens, part: str) -> None:
    if not len(rows):
        raise ValueError(
            f"task has too little text for a sequence of {part}; give more, or a smaller seq_length"
        )
    with replacing(path) as new, new.open("wb") as file:
        np.save(file, rows)


def _without_paths(settings: TextSettings) -> dict[str, Any]:
    """Of which the text tells all that matters."""
    paths = ("train", *PARTS, "files")
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in paths}


def _of_seed(seed: int) -> str:
    return f"train-seed{seed}.npy"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
