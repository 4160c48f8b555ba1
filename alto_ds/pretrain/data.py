"""Which sequences are in which batch?

Documents are split into a training and a held-out part, tokenized, joined with an end-of-text
token after each, and cut into sequences of equal length. The order of the training sequences
depends on the seed alone: global batch k holds the same sequences for any number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alto_ds.pretrain.text import TEXT, documents

END_OF_TEXT = "<|endoftext|>"
TOKENS = "input_ids"
# Documents that are held out of a stream, whose length nobody knows.
STREAMED_VALIDATION_DOCUMENTS = 500


class Sequences:
    """Training and held-out sequences of ``seq_length`` tokens.

    Attributes:
        tokenizer: a fast tokenizer of ``transformers``.
        validation: ``[sequences, seq_length]``, the held-out tokens, int64, on the CPU.
        fingerprint: changes with text, tokenizer and length; tells runs on other data apart.
    """

    def __init__(self, arguments: Namespace) -> None:
        """Read, split, tokenize and pack; later calls find all that in the library's cache.

        Raises:
            ValueError: there is not enough text, or a setting does not fit it.
        """
        source = documents(arguments)
        self.seed: int = arguments.seed
        self.length: int = arguments.seq_length
        if arguments.streaming:
            held_out = source.take(STREAMED_VALIDATION_DOCUMENTS)
            training = source.skip(STREAMED_VALIDATION_DOCUMENTS)
        else:
            if len(source) < 2:
                raise ValueError(
                    f"the text has {len(source)} document(s) of up to 20,000 characters; at least "
                    "2 are needed, one to train on and one to hold out."
                )
            split = source.train_test_split(arguments.validation_fraction, seed=self.seed)
            held_out, training = split["test"], split["train"]
        self.tokenizer = _tokenizer(arguments, training)
        backend = self.tokenizer.backend_tokenizer.to_str()
        origin = arguments.dataset if arguments.streaming else training._fingerprint
        self.fingerprint = _digest(backend, origin, self.length)
        validation = itertools.islice(self._pack(held_out), arguments.validation_sequences)
        self.validation = torch.tensor([row[TOKENS] for row in validation]).view(-1, self.length)
        self._training = self._pack(training)
        if not arguments.streaming:
            self._training = self._training.with_format("torch")
            if not len(self._training) or not len(self.validation):
                raise ValueError(
                    f"--seq_length={self.length} is longer than the text: it makes "
                    f"{len(self._training)} sequences to train on and {len(self.validation)} to "
                    "validate on. Use a smaller --seq_length, more text, or another "
                    "--validation_fraction."
                )

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
        micro = batch_size // gas // world_size
        sequences = self._stream(first_batch * batch_size)
        while True:
            batch = list(itertools.islice(sequences, batch_size))
            for accumulated in range(gas):
                start = (accumulated * world_size + rank) * micro
                yield torch.stack([fetch() for fetch in batch[start : start + micro]])

    def _stream(self, start: int) -> Iterator[Any]:
        """Sequences from number ``start`` on, epoch after epoch, each as a function that reads it.

        A rank reads only what is in its own micro batches.
        """
        if hasattr(self._training, "skip") and not hasattr(self._training, "__len__"):
            sequences = iter(self._training.skip(start))
            while True:
                for row in sequences:
                    yield lambda row=row: torch.as_tensor(row[TOKENS])
                sequences = iter(self._training)
        total = len(self._training)
        for epoch in itertools.count(start // total):
            order = torch.randperm(
                total, generator=torch.Generator().manual_seed(self.seed + epoch)
            )
            first = start % total if epoch == start // total else 0
            for index in order[first:].tolist():
                yield lambda index=index: self._training[index][TOKENS]

    def _pack(self, part: Any) -> Any:
        """Tokens of the documents in sequences; the rest of each thousand documents is dropped."""
        settings = {"batched": True, "remove_columns": [TEXT]}
        if hasattr(part, "_fingerprint") and hasattr(part, "__len__"):
            # The library would pickle the tokenizer for this, which differs from run to run.
            settings["new_fingerprint"] = _digest(self.fingerprint, part._fingerprint)
            settings["desc"] = "Tokenizing"
        return part.map(self._pack_documents, **settings)

    def _pack_documents(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        end = self.tokenizer.eos_token_id
        encoded = self.tokenizer.backend_tokenizer.encode_batch(
            batch[TEXT], add_special_tokens=False
        )
        stream = [token for document in encoded for token in (*document.ids, end)]
        last = len(stream) - self.length + 1
        return {TOKENS: [stream[i : i + self.length] for i in range(0, last, self.length)]}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _tokenizer(arguments: Namespace, training: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that the command line names, or a byte-level BPE trained on the text.

    A trained one is kept in the output folder, so that a resumed run goes on with it.
    """
    folder = Path(arguments.output_dir, "tokenizer")
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"--tokenizer={arguments.tokenizer} has no end-of-text token (eos_token), which "
                "separates documents; use one that has, such as GPT-2's."
            )
        return tokenizer
    if folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    texts = (row[TEXT] for row in itertools.islice(training, arguments.tokenizer_documents))
    bpe.train_from_iterator(
        texts, vocab_size=arguments.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
