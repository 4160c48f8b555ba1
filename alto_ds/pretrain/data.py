"""Which sequences are in which batch?

Documents are split into a training and a held-out part, tokenized, joined with an end-of-text
token after each, and cut into sequences of equal length. The order of the training sequences
depends on the seed alone: global batch k holds the same sequences for any number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
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
        self._cache_key = _digest(self.tokenizer.backend_tokenizer.to_str(), self.length)
        validation = itertools.islice(self._pack(held_out), arguments.validation_sequences)
        self.validation = torch.tensor([row[TOKENS] for row in validation]).view(-1, self.length)
        self._training = self._pack(training)
        if arguments.streaming:
            origin = [arguments.dataset, arguments.dataset_config, arguments.dataset_split]
            sample = next(iter(self._training), None)
            trains_on = 0 if sample is None else 1
        else:
            self._training = self._training.with_format("torch")
            trains_on = len(self._training)
            some = self._training[:: max(trains_on // 64, 1)][TOKENS] if trains_on else []
            origin, sample = [str(trains_on)], [row.tolist() for row in some]
        if not trains_on or not len(self.validation):
            raise ValueError(
                f"there is too little text for --seq_length={self.length}: it makes "
                f"{'no' if not trains_on else 'some'} sequences to train on and "
                f"{len(self.validation)} to validate on. Use a smaller --seq_length, more text, "
                f"or another --validation_fraction (a stream holds out its first "
                f"{STREAMED_VALIDATION_DOCUMENTS} documents)."
            )
        # Of contents, not of times or paths, so that a copy of the text resumes the run.
        self.fingerprint = _digest(self._cache_key, origin, sample, self.validation.tolist())

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

        A rank reads only what is in its own micro batches, but a stream is read as a whole, also
        to skip what was done before: nobody else knows where its sequences begin.
        """
        if not hasattr(self._training, "__len__"):
            for number, row in enumerate(
                itertools.chain.from_iterable(itertools.repeat(self._training))
            ):
                if number >= start:
                    yield lambda row=row: torch.as_tensor(row[TOKENS])
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
            settings["new_fingerprint"] = _digest(self._cache_key, part._fingerprint)
            settings["desc"] = "Tokenizing"
        return part.map(self._pack_documents, **settings)

    def _pack_documents(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        end = self.tokenizer.eos_token_id
        texts = [text for text in batch[TEXT] if text]  # datasets have nulls, too
        encoded = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        stream = [token for document in encoded for token in (*document.ids, end)]
        last = len(stream) - self.length + 1
        return {TOKENS: [stream[i : i + self.length] for i in range(0, last, self.length)]}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _tokenizer(arguments: Namespace, training: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that the command line names, or a byte-level BPE trained on the text.

    A trained one is kept in the output folder: a resumed run goes on with it, and the other
    ranks read it, unless it was trained on other text or of another size.
    """
    folder = Path(arguments.output_dir, "tokenizer")
    resumed = Path(arguments.output_dir, "checkpoints", "latest").is_file()
    made_of = {
        "text": getattr(training, "_fingerprint", ""),
        "size": arguments.vocab_size,
        "documents": arguments.tokenizer_documents,
    }
    record = folder / "trained_on.json"
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"--tokenizer={arguments.tokenizer} has no end-of-text token (eos_token), which "
                "separates documents; use one that has, such as GPT-2's."
            )
        return tokenizer
    if record.is_file() and (resumed or json.loads(record.read_text()) == made_of):
        return AutoTokenizer.from_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    rows = itertools.islice(training, arguments.tokenizer_documents)
    texts = (row[TEXT] or "" for row in rows)
    bpe.train_from_iterator(
        texts, vocab_size=arguments.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(folder)
    record.write_text(json.dumps(made_of))  # last, so that a folder without it is incomplete
    return tokenizer
