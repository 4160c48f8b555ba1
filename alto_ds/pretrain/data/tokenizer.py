"""Which tokenizer makes tokens of the text?"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alto_ds.pretrain.data.text import TEXT
from alto_ds.pretrain.settings import DataSettings

END_OF_TEXT = "<|endoftext|>"


def make_tokenizer(
    settings: DataSettings,
    documents: Iterable[dict[str, Any]],
    fingerprint: str,
    folder: Path,
    resumed: bool,
) -> PreTrainedTokenizerFast:
    """The tokenizer that the settings name, or a byte-level BPE trained on the documents.

    Args:
        settings: which tokenizer.
        documents: to train it on, one column ``text``.
        fingerprint: of the documents.
        folder: where a trained tokenizer is kept. The other ranks read it from there, unless it
            was trained on other text or of another size.
        resumed: whether the run has a checkpoint: it goes on with the tokenizer that is kept.

    Raises:
        ValueError: the tokenizer that the settings name has no end-of-text token.
    """
    if settings.tokenizer:
        return _named(settings.tokenizer)
    made_of = {
        "text": fingerprint,
        "size": settings.vocab_size,
        "documents": settings.tokenizer_documents,
    }
    record = folder / "trained_on.json"
    if record.is_file() and (resumed or json.loads(record.read_text()) == made_of):
        return AutoTokenizer.from_pretrained(folder)
    texts = (row[TEXT] or "" for row in itertools.islice(documents, settings.tokenizer_documents))
    tokenizer = _train(texts, settings.vocab_size)
    tokenizer.save_pretrained(folder)
    record.write_text(json.dumps(made_of))  # last, so that a folder without it is incomplete
    return tokenizer


def _named(name: str) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--tokenizer={name} has no end-of-text token (eos_token), which separates documents; "
            "use one that has, such as GPT-2's."
        )
    return tokenizer


def _train(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )
