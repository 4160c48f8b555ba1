"""How well does a model predict a text? Perplexity by token and by word.

.. code-block:: bash

    python -m alto_ds.pretrain.evaluate runs/demo --text FILE...
    python -m alto_ds.pretrain.evaluate runs/demo   # the text that the run held out

Each file is one document, after an end-of-text token, and each of its tokens is predicted once.
A window of ``--seq_length`` tokens moves on by ``--stride`` tokens; what it has in common with the
window before is context only. With L, the sum of −ln p over all tokens, perplexity by token is
exp(L / tokens), which depends on the tokenizer, and by word exp(L / words), which does not; words
are what white space separates. What a run held out is in sequences that begin and end anywhere,
so there it is by token only.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from alto_ds.pretrain.data.text import read_text
from alto_ds.pretrain.held_out import read_held_out
from alto_ds.pretrain.metrics import perplexity
from alto_ds.pretrain.model import IGNORED
from alto_ds.pretrain.options import OneLineParser
from alto_ds.pretrain.trained import load_trained


def windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows of a document, each with what it predicts.

    Args:
        tokens: of the document, the end-of-text token before it included.
        length: tokens of a window that are given, at most.
        stride: tokens by which it moves on, at most ``length``.

    Yields:
        Two of int64 of the same length: the tokens given, and for each of them the one after it,
        or :data:`IGNORED` where an earlier window has predicted that. The last may be shorter.
    """
    done = 0
    for start in range(0, max(len(tokens) - 1, 0), stride):
        given = torch.tensor(tokens[start : start + length + 1])
        targets = given[1:].clone()
        targets[: done - start] = IGNORED
        yield given[:-1], targets
        done = start + len(targets)
        if done == len(tokens) - 1:
            return


@torch.inference_mode()
def loss_of(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], length: int, stride: int, batch: int
) -> tuple[float, int]:
    """The sum of −ln p in nats, and the number of tokens that were predicted.

    Args:
        model: in evaluation mode.
        documents: tokens, see :func:`windows`.
        length: see :func:`windows`.
        stride: see :func:`windows`.
        batch: windows at once.
    """
    found = [window for tokens in documents for window in windows(tokens, length, stride)]
    total, count = 0.0, 0
    for first in tqdm(range(0, len(found), batch), disable=None, desc="evaluating"):
        some = found[first : first + batch]
        # Padding comes after all that is predicted, which does not look at it.
        given = pad_sequence([row for row, _ in some], batch_first=True)
        targets = pad_sequence([row for _, row in some], batch_first=True, padding_value=IGNORED)
        targets = targets.to(model.device)
        logits = model(given.to(model.device), use_cache=False).logits.float()
        losses = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        total += losses.double().sum().item()
        count += int((targets != IGNORED).sum())
    return total, count


def main() -> None:
    """Print perplexities, readable and as a line of JSON."""
    parser = OneLineParser(
        prog="alto_ds.pretrain.evaluate",
        description="Perplexity of a model, by token and by word.",
    )
    parser.add_argument("model", help="a run's folder, a checkpoint, or a Hugging Face model")
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="default: what the run held out"
    )
    parser.add_argument("--encoding", default="utf-8", help="of the files (default: utf-8)")
    parser.add_argument("--tokenizer", help="hub name or folder (default: the model's own)")
    parser.add_argument("--seq_length", type=int, help="default: all that the model takes")
    parser.add_argument("--stride", type=int, help="default: half of --seq_length")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at once")
    given = parser.parse_args()
    try:
        trained = load_trained(given.model, given.tokenizer)
        most = trained.length
        length = most if given.seq_length is None else given.seq_length
        stride = max(length // 2, 1) if given.stride is None else given.stride
        for name, value, top in (
            *(("seq_length", length, most), ("stride", stride, length)),
            ("batch_size", given.batch_size, math.inf),
        ):
            if not 1 <= value <= top:
                raise ValueError(f"--{name}={value} must be from 1 to {top}")
        if given.text is None:
            if given.tokenizer is not None:
                raise ValueError("--tokenizer goes with --text; leave it out")
            documents, words = read_held_out(given.model), None
        else:
            documents, words = _documents_of(given.text, given.encoding, trained.tokenizer)
        total, tokens = loss_of(trained.model, documents, length, stride, given.batch_size)
    except (OSError, LookupError, ValueError) as error:
        parser.error(f"{error}.")
    found = {
        **{"model": trained.source, "tokens": tokens, "words": words, "loss": total / tokens},
        "perplexity": perplexity(total / tokens),
        "word_perplexity": None if words is None else perplexity(total / words),
        **{"seq_length": length, "stride": stride},
    }
    line = (
        f"{found['model']}: loss {found['loss']:.4f} nats a token, perplexity "
        f"{found['perplexity']:.2f} by token ({tokens:,})"
    )
    if words is not None:
        line += f" and {found['word_perplexity']:.2f} by word ({words:,})"
    print(line, file=sys.stderr)
    print(json.dumps(found))


def _documents_of(
    paths: Sequence[Path], encoding: str, tokenizer: Any
) -> tuple[list[list[int]], int]:
    """The tokens of each file, an end-of-text token before them; and the words of all."""
    texts = [read_text(path, encoding) for path in paths]
    words = sum(len(text.split()) for text in texts)
    if not words:
        raise ValueError(f"--text={' '.join(map(str, paths))} has no words")
    end = tokenizer.eos_token_id
    documents = [[end, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    return documents, words


if __name__ == "__main__":
    main()
