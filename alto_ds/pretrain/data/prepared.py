"""Sequences of a text that was prepared before: ``--data``.

A part of the documents is held out, by the seed. The others are joined in an order that the seed
decides, and cut into sequences of equal length, which come in a new order in each epoch. Nothing
of that is written anywhere: a rank maps the shards into memory and reads what is in its batches.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alto_ds.pretrain.data.indexed import IndexedDataset
from alto_ds.pretrain.data.order import blended, micro_batches, permutation, shuffled
from alto_ds.pretrain.data.shards import (
    PREPARE,
    Shard,
    manifest_of,
    problem_of_shard,
    read_record,
    shard_prefix,
    tokenizer_hash,
    tokenizer_of,
)
from alto_ds.pretrain.data.tokenizer import load_tokenizer, named_tokenizer
from alto_ds.pretrain.environment import is_first_of_node
from alto_ds.pretrain.settings import Settings

Ints = npt.NDArray[np.int64]


class PreparedSequences:
    """Sequences of prepared texts, blended by weights. See :class:`.sequences.Sequences`.

    Raises:
        ValueError: a manifest or a shard is missing, broken or cut off; the tokenizer is another
            than that of the text; or there is too little text.
    """

    def __init__(self, settings: Settings) -> None:
        data, length, self._seed = settings.data, settings.model.length, settings.run.seed
        blend = data.blend
        shards = {prefix: read_record(manifest_of(prefix)) for prefix in blend}
        self.tokenizer = _tokenizer(data.tokenizer, shards)
        # The files are read once on each node.
        contents = data.verify_data and is_first_of_node(os.environ)
        for prefix, parts in shards.items():
            _check(prefix, parts, contents)
        self._weights = list(blend.values())
        self._training: list[Packed] = []
        validation = []
        for (prefix, weight), parts in zip(blend.items(), shards.values(), strict=True):
            text = PreparedText(prefix, len(parts))
            order = permutation(len(text), self._seed).numpy()
            held_out = max(round(len(text) * data.validation_fraction), 1)
            first, rest = (
                Packed(text, part, length) for part in (order[:held_out], order[held_out:])
            )
            wanted = max(round(data.validation_sequences * weight), 1)
            validation += [first.read(number) for number in range(min(wanted, len(first)))]
            if not len(first) or not len(rest):
                raise ValueError(
                    f"--data={prefix} has too little text for --seq_length={length}: it makes "
                    f"{len(rest)} sequences to train on and {len(first)} to validate on. Use a "
                    "smaller --seq_length, more text, or another --validation_fraction."
                )
            self._training.append(rest)
        self.validation = torch.stack(validation)
        self.fingerprint = _digest(shards, self._weights, length, self.validation)

    def training_batches(
        self, first_batch: int, batch_size: int, gas: int, rank: int, world_size: int
    ) -> Iterator[Tensor]:
        """See :meth:`.sequences.Sequences.training_batches`."""
        order = self._order(first_batch * batch_size)
        return micro_batches(order, self._read, batch_size, gas, rank, world_size)

    def _order(self, start: int) -> Iterator[tuple[int, int]]:
        """Numbers of a text and of a sequence in it, from the ``start``-th sequence on."""
        orders: dict[int, Iterator[int]] = {}
        for text, turn in blended(self._weights, start):
            if text not in orders:
                orders[text] = shuffled(len(self._training[text]), turn, self._seed)
            yield text, next(orders[text])

    def _read(self, place: tuple[int, int]) -> Tensor:
        text, number = place
        return self._training[text].read(number)


class PreparedText:
    """The documents of all shards of a prefix.

    Args:
        prefix: as in :mod:`alto_ds.pretrain.prepare`.
        shards: their number.

    Attributes:
        starts: ``[documents + 1]`` int64, where each document begins in the tokens of all shards,
            and their number.
    """

    def __init__(self, prefix: str, shards: int) -> None:
        parts = [IndexedDataset(shard_prefix(prefix, n, shards)) for n in range(shards)]
        self._tokens = [part.tokens for part in parts]
        self._offsets = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        begins = [
            part.starts[:-1] + offset
            for part, offset in zip(parts, self._offsets[:-1], strict=True)
        ]
        self.starts: Ints = np.concatenate([*begins, self._offsets[-1:]])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, start: int, end: int) -> npt.NDArray[Any]:
        """Tokens from one place of all shards' to another; both must be in one document."""
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        offset = self._offsets[shard]
        return self._tokens[shard][start - offset : end - offset]


class Packed:
    """Documents of a text, joined in a given order and cut into sequences.

    Keeps 16 bytes for each document. The tokens that do not fill the last sequence are dropped.

    Args:
        text: with the documents.
        order: ``[documents]`` int64, their numbers.
        length: tokens of a sequence.
    """

    def __init__(self, text: PreparedText, order: Ints, length: int) -> None:
        self._text, self._order, self._length = text, order, length
        self._ends = np.cumsum(text.starts[order + 1] - text.starts[order])

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._length if len(self._ends) else 0

    def read(self, number: int) -> Tensor:
        """``[length]`` tokens of a sequence, int64."""
        at, end = number * self._length, (number + 1) * self._length
        parts = []
        place = int(np.searchsorted(self._ends, at, side="right"))
        while at < end:
            document_end = int(self._ends[place])
            until = min(document_end, end)
            # What is left of the document counts back from its end.
            last = int(self._text.starts[self._order[place] + 1])
            parts.append(self._text.read(last - (document_end - at), last - (document_end - until)))
            at, place = until, place + 1
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _tokenizer(name: str | None, shards: dict[str, list[Shard]]) -> PreTrainedTokenizerFast:
    """The tokenizer of all prefixes, from the first one's folder where none is named."""
    first = next(iter(shards))
    if name is None:
        try:
            tokenizer = load_tokenizer(str(tokenizer_of(first)))
        except ValueError as error:
            raise ValueError(
                f"the tokenizer of --data={first} is broken: {error}; copy it back, or name it by "
                "--tokenizer"
            ) from None
    else:
        tokenizer = named_tokenizer(name)
    found = tokenizer_hash(tokenizer)
    for prefix, parts in shards.items():
        if parts[0].tokenizer != found:
            raise ValueError(
                f"--data={prefix} was prepared with another tokenizer than "
                f"{name or tokenizer_of(first)}: {manifest_of(prefix)} has "
                f"{parts[0].tokenizer[:16]}, this one is {found[:16]}. Name the one it was "
                f"prepared with, or prepare the text again by {PREPARE}."
            )
    return tokenizer


def _check(prefix: str, shards: list[Shard], contents: bool) -> None:
    folder = Path(prefix).parent
    problems = (problem_of_shard(folder, shard, contents) for shard in shards)
    problem = next(filter(None, problems), None)
    if problem is not None:
        raise ValueError(
            f"--data={prefix}: {problem}. Copy it back, or run {PREPARE} again, which writes "
            "broken shards anew."
        )


def _digest(
    shards: dict[str, list[Shard]], weights: list[Fraction], length: int, validation: Tensor
) -> str:
    """Of contents, not of paths, so that a copy of the text resumes the run."""
    crcs = [
        [entry for _, entry in sorted(shard.files.items())]
        for shard in itertools.chain.from_iterable(shards.values())
    ]
    hashes = [parts[0].tokenizer for parts in shards.values()]
    whole = (crcs, hashes, [str(w) for w in weights], length, validation.tolist())
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:16]
