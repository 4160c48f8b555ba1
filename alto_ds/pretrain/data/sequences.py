"""Which sequences are in which batch?

Documents are split into a training and a held-out part, tokenized, joined with an end-of-text
token after each, and cut into sequences of equal length. The order of the training sequences
depends on the seed alone: global batch k holds the same sequences for any number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alto_ds.pretrain.data.order import micro_batches, shuffled
from alto_ds.pretrain.data.prepared import PreparedSequences
from alto_ds.pretrain.data.streamed import HELD_OUT_DOCUMENTS, Stream, Tokens, joined
from alto_ds.pretrain.data.text import TEXT, documents
from alto_ds.pretrain.data.tokenizer import make_tokenizer
from alto_ds.pretrain.settings import Settings

TOKENS = "input_ids"


class Sequences(Protocol):
    """Training and held-out sequences of equal length.

    Attributes:
        tokenizer: a fast tokenizer of ``transformers``.
        validation: ``[sequences, seq_length]``, the held-out tokens, int64, on the CPU.
        fingerprint: changes with text, tokenizer and length; tells runs on other data apart.
    """

    tokenizer: PreTrainedTokenizerFast
    validation: Tensor
    fingerprint: str

    def training_batches(
        self, first_batch: int, batch_size: int, gas: int, rank: int, world_size: int
    ) -> Iterator[Tensor]:
        """Yield this rank's micro batches from global batch ``first_batch`` on, without end.

        Args:
            first_batch: number of the first global batch, from 0.
            batch_size: sequences in a global batch.
            gas: micro batches of each rank in a global batch.
            rank: this rank.
            world_size: number of ranks.

        Yields:
            ``[batch_size / gas / world_size, seq_length]`` tokens, int64, on the CPU.
        """
        ...


def make_sequences(settings: Settings, resumed: bool) -> Sequences:
    """Read, split, tokenize and pack; later calls find all that in the library's cache.

    A prepared text is mapped into memory instead.

    Args:
        settings: of the run.
        resumed: whether the run has a checkpoint, and so a tokenizer to go on with.

    Raises:
        ValueError: there is not enough text, or a setting does not fit it.
    """
    if settings.data.data:
        return PreparedSequences(settings)
    kind = StreamedSequences if settings.data.streaming else StoredSequences
    return kind(settings, resumed)


class StoredSequences:
    """Sequences of documents on the disk, in a new order in each epoch. See :class:`Sequences`."""

    def __init__(self, settings: Settings, resumed: bool) -> None:
        source = documents(settings.data)
        if len(source) < 2:
            raise ValueError(
                f"the text has {len(source)} document(s) of up to 20,000 characters; at least "
                "2 are needed, one to train on and one to hold out."
            )
        self._seed = settings.run.seed
        split = source.train_test_split(settings.data.validation_fraction, seed=self._seed)
        training, held_out = split["train"], split["test"]
        self.tokenizer = _tokenizer(settings, training, training._fingerprint, resumed)
        key = _cache_key(self.tokenizer, settings)
        packed = _pack_stored(held_out, self.tokenizer, settings, key)
        self.validation = _first_rows(packed, settings)
        self._training = _pack_stored(training, self.tokenizer, settings, key).with_format("torch")
        total = len(self._training)
        _check_amount(total, self.validation, settings)
        # Of contents, not of times or paths, so that a copy of the text resumes the run.
        some = [row.tolist() for row in self._training[:: max(total // 64, 1)][TOKENS]]
        self.fingerprint = digest(key, [str(total)], some, self.validation.tolist())

    def training_batches(
        self, first_batch: int, batch_size: int, gas: int, rank: int, world_size: int
    ) -> Iterator[Tensor]:
        """See :meth:`Sequences.training_batches`."""
        order = shuffled(len(self._training), first_batch * batch_size, self._seed)
        return micro_batches(order, self._read, batch_size, gas, rank, world_size)

    def _read(self, index: int) -> Tensor:
        return self._training[index][TOKENS]


class StreamedSequences:
    """Sequences of documents that are read while training. See :class:`Sequences`.

    Each rank reads and tokenizes a share, also of what was done before a run is resumed. See
    :mod:`.streamed`.
    """

    def __init__(self, settings: Settings, resumed: bool) -> None:
        data, self._length = settings.data, settings.model.length
        origin = [data.dataset, data.dataset_config, data.dataset_split]
        self._stream = Stream(documents(data), data.dataset)
        self.tokenizer = _tokenizer(settings, self._stream.training, digest(*origin), resumed)
        pack = functools.partial(_pack, tokenizer=self.tokenizer, length=self._length)
        held_out = self._stream.held_out.map(pack, batched=True, remove_columns=[TEXT])
        self.validation = _first_rows(held_out, settings)
        sample = next(self._sequences(0, rank=0, world_size=1), None)
        _check_amount(0 if sample is None else 1, self.validation, settings)
        self.fingerprint = digest(
            _cache_key(self.tokenizer, settings),
            # Runs on one file that began before there were parts go on.
            origin if self._stream.parts == 1 else [*origin, self._stream.parts],
            None if sample is None else {TOKENS: sample.tolist()},
            self.validation.tolist(),
        )

    def training_batches(
        self, first_batch: int, batch_size: int, gas: int, rank: int, world_size: int
    ) -> Iterator[Tensor]:
        """See :meth:`Sequences.training_batches`. All ranks must take from it together."""
        sequences = self._sequences(first_batch * batch_size, rank, world_size)
        return micro_batches(sequences, self._read, batch_size, gas, rank, world_size)

    def _sequences(self, start: int, rank: int, world_size: int) -> Iterator[Tokens]:
        return self._stream.sequences(self.tokenizer, self._length, start, rank, world_size)

    @staticmethod
    def _read(tokens: Tokens) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64))


def _pack(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, length: int
) -> dict[str, list[list[int]]]:
    """Tokens of the documents in sequences; the rest of each thousand documents is dropped."""
    texts = [text for text in batch[TEXT] if text]  # datasets have nulls, too
    stream = joined(texts, tokenizer)
    last = len(stream) - length + 1
    return {TOKENS: [stream[i : i + length] for i in range(0, last, length)]}


def _pack_stored(
    part: Any, tokenizer: PreTrainedTokenizerFast, settings: Settings, key: str
) -> Any:
    return part.map(
        functools.partial(_pack, tokenizer=tokenizer, length=settings.model.length),
        batched=True,
        remove_columns=[TEXT],
        # The library would pickle the tokenizer for this, which differs from run to run.
        new_fingerprint=digest(key, part._fingerprint),
        desc="Tokenizing",
    )


def _first_rows(packed: Iterable[dict[str, Any]], settings: Settings) -> Tensor:
    rows = itertools.islice(packed, settings.data.validation_sequences)
    return torch.tensor([row[TOKENS] for row in rows]).view(-1, settings.model.length)


def _tokenizer(
    settings: Settings, training: Any, fingerprint: str, resumed: bool
) -> PreTrainedTokenizerFast:
    folder = Path(settings.run.output_dir, "tokenizer")
    return make_tokenizer(settings.data, training, fingerprint, folder, resumed)


def _check_amount(training: int, validation: Tensor, settings: Settings) -> None:
    if not training or not len(validation):
        raise ValueError(
            f"there is too little text for --seq_length={settings.model.length}: it makes "
            f"{'some' if training else 'no'} sequences to train on and {len(validation)} to "
            f"validate on. Use a smaller --seq_length, more text, or another "
            f"--validation_fraction (a stream holds out its first "
            f"{HELD_OUT_DOCUMENTS} documents)."
        )


def _cache_key(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> str:
    return digest(tokenizer.backend_tokenizer.to_str(), settings.model.length)


def digest(*parts: Any) -> str:
    """A name for what decides how data come out, of 16 characters; parts are told by repr()."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
