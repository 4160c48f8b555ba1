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
        ValueError: the tokenizer that the settings name cannot be loaded, is no fast one or has
            no end-of-text token; or that of a resumed run is broken.
    """
    if settings.tokenizer:
        return named_tokenizer(settings.tokenizer)
    made_of = {
        "text": fingerprint,
        "size": settings.vocab_size,
        "documents": settings.tokenizer_documents,
    }
    record = folder / "trained_on.json"
    if resumed:
        return _kept(folder, record)
    try:
        if json.loads(record.read_bytes()) == made_of:
            return _whole(folder)
    except (OSError, ValueError):
        pass  # none is there, or not a whole one: no checkpoint depends on it, so train it anew
    texts = (row[TEXT] or "" for row in itertools.islice(documents, settings.tokenizer_documents))
    tokenizer = _train(texts, settings.vocab_size)
    tokenizer.save_pretrained(folder)
    record.write_text(json.dumps(made_of))  # last, so that a folder without it is incomplete
    return tokenizer


def _kept(folder: Path, record: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a run was started with; another would give its tokens other meanings."""
    try:
        json.loads(record.read_bytes())
        return _whole(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer that the run was started with is broken: {_one_line(error)}. Copy a "
            f"whole one to {folder}, name the --tokenizer that the run was started with, or start "
            "anew with another --output_dir."
        ) from None


def _whole(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer that was trained here."""
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.eos_token != END_OF_TEXT:  # the library makes up for files that are missing
        raise ValueError(f"{folder} has no end-of-text token")
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer; what is wrong with it is a ValueError, whatever the library raises."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded: {_one_line(error)}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{name} is a {type(tokenizer).__name__}, no fast tokenizer")
    # Some come with the length of a sequence for sentences. Documents are tokenized whole.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def named_tokenizer(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        raise ValueError(
            f"--tokenizer={error}. Name one of the hub, or a folder with tokenizer.json."
        ) from error
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
