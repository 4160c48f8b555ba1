"""How do ranks share a stream of documents, so that all have the same sequences?

The files of the stream are dealt to parts. A turn takes a thousand documents, as many of each
part, joins their tokens in the order of the parts, and cuts them into sequences. None of that
depends on the number of ranks. A part is read by one rank; where there are more ranks than parts
by several, each of which tokenizes a share of its documents. Then all tell each other the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from alto_ds.checkpoint.ranks import Ranks
from alto_ds.pretrain.data.text import TEXT

PARTS = 16  # at most; one rank alone has as many files open
DOCUMENTS = 1000  # of a turn
# Documents that are held out of a stream, whose length nobody knows.
HELD_OUT_DOCUMENTS = 500

Tokens = npt.NDArray[np.int32]


class Share(NamedTuple):
    """What a rank tokenizes of a part: the ``number``-th of ``readers`` equal shares."""

    part: int
    number: int
    readers: int


Told = dict[Share, Tokens]  # what a rank tells the others
Together = Callable[[Callable[[], Told]], list[Told]]  # lets each rank read; what all have told


def shares_of(rank: int, world_size: int, parts: int) -> list[Share]:
    """The shares of a rank; those of all ranks make up all parts."""
    readers = [range(part % world_size, world_size, parts) for part in range(parts)]
    return [
        Share(part, ranks.index(rank), len(ranks))
        for part, ranks in enumerate(readers)
        if rank in ranks
    ]


class Stream:
    """The documents of a stream, the first of them held out, in parts.

    Args:
        source: ``datasets.IterableDataset`` with a column ``text``.
        name: of it, for messages.

    Attributes:
        held_out: the first documents of the first part, a dataset as ``source``.
        training: all others, part after part.
        parts: their number, of the number of files alone.
    """

    def __init__(self, source: Any, name: str | None) -> None:
        self._name = name
        self.parts = min(source.num_shards, PARTS)
        first, *others = (source.shard(self.parts, number) for number in range(self.parts))
        self.held_out = first.take(HELD_OUT_DOCUMENTS)
        self._parts = [first.skip(HELD_OUT_DOCUMENTS), *others]
        self.training = datasets.concatenate_datasets(self._parts)

    def sequences(
        self,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        start: int,
        rank: int,
        world_size: int,
    ) -> Iterator[Tokens]:
        """The training sequences, epoch after epoch; those of all ranks, the same on each.

        Where there are several ranks, all must take from it together.

        Args:
            tokenizer: makes the tokens.
            length: tokens of a sequence.
            start: number of the first sequence to yield. Those before are read and tokenized, too:
                nothing else tells how many a text makes.
            rank: this rank.
            world_size: number of ranks.

        Yields:
            ``[length]`` tokens, int32. It ends only where an epoch makes no sequence.

        Raises:
            RuntimeError: on all ranks, where one of them cannot read its share.
        """
        together = Ranks(RuntimeError).together if world_size > 1 else _alone
        shares = shares_of(rank, world_size, self.parts)
        made = 1
        while made:
            made = 0
            for stream in self._epoch(shares, tokenizer, together):
                count = len(stream) // length
                made += count
                yield from stream[: count * length].reshape(count, length)[start:]
                start = max(start - count, 0)

    def _epoch(
        self, shares: list[Share], tokenizer: PreTrainedTokenizerFast, together: Together
    ) -> Iterator[Tokens]:
        """The tokens of each turn, of all ranks' shares."""
        of_part = -(-DOCUMENTS // self.parts)
        turns = [self._parts[share.part].iter(of_part) for share in shares]

        def read() -> Told:
            try:
                return _read(shares, turns, tokenizer)
            except Exception as error:  # the library has no base class of what it raises
                reason = " ".join(str(error.__cause__ or error).split())
                raise RuntimeError(f"--dataset={self._name} cannot be read on: {reason}") from error

        while any(found := together(read)):
            tokens = {share: tokens for theirs in found for share, tokens in theirs.items()}
            yield np.concatenate([tokens[share] for share in sorted(tokens)])


def _alone(read: Callable[[], Told]) -> list[Told]:
    return [read()]


def _read(shares: list[Share], turns: list[Any], tokenizer: PreTrainedTokenizerFast) -> Told:
    """The tokens of this rank's shares of the next turn; nothing of parts that have ended."""
    found = {}
    for share, turn in zip(shares, turns, strict=True):
        rows = next(turn, None)
        if rows is not None:
            texts = [text for text in rows[TEXT] if text]  # datasets have nulls, too
            first, end = (len(texts) * n // share.readers for n in (share.number, share.number + 1))
            found[share] = np.array(joined(texts[first:end], tokenizer), dtype=np.int32)
    return found


def joined(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of the documents, with an end-of-text token after each."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return [token for document in encoded for token in (*document.ids, end)]
