"""megatron-core's own GPTDataset reads what ``alto_ds.pretrain.prepare`` has written."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")
pytest.importorskip("megatron.core")

from alto_ds.pretrain.data.indexed import IndexedDataset
from alto_ds.pretrain.data.prepare import prepare
from alto_ds.pretrain.data.shards import shard_prefix, tokenizer_of
from alto_ds.pretrain.data.tokenizer import load_tokenizer
from alto_ds.pretrain.settings import DataSettings
from tests.pretrain.runs import STDLIB

SEQUENCE = 32
WEIGHTS = [0.2, 0.3, 0.5]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, datasets_cache: None) -> SimpleNamespace:
    """Two texts of one tokenizer, the first in two shards: three prefixes for Megatron."""
    folder = tmp_path_factory.mktemp("texts")
    first, second = str(folder / "first"), str(folder / "second")
    prepare(DataSettings(text=parts(folder, "argparse.py"), vocab_size=400), first, 2, 1)
    tokenizer = str(tokenizer_of(first))
    prepare(DataSettings(text=parts(folder, "typing.py"), tokenizer=tokenizer), second, 1, 1)
    prefixes = [shard_prefix(first, 0, 2), shard_prefix(first, 1, 2), shard_prefix(second, 0, 1)]
    return SimpleNamespace(prefixes=prefixes, tokenizer=tokenizer)


def parts(folder: Path, name: str) -> list[Path]:
    """A file of Python's own in parts of 1,000 characters, each a document."""
    text = (STDLIB / name).read_text()
    paths = []
    for start in range(0, len(text), 1000):
        paths.append(folder / f"{start:06d}-{name}")
        paths[-1].write_text(text[start : start + 1000])
    return paths


def built(texts: SimpleNamespace, weights: list[float] | None, samples: int | None) -> list[Any]:
    """Megatron's training and validation data; it keeps its indices beside the files."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE,
        blend=(texts.prefixes, weights),
        split="80,20,0",
        tokenizer=MegatronTokenizer.from_pretrained(
            tokenizer_path=texts.tokenizer, metadata_path={"library": "huggingface"}
        ),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    sizes = [None] * 3 if samples is None else [samples, samples // 10, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[:2]


def stream_of(prefix: str, dataset: Any) -> Any:
    """The tokens of our reader, documents joined in the order that Megatron has drawn."""
    documents = IndexedDataset(prefix)
    return np.concatenate([documents[number] for number in dataset.document_index])


def test_a_blend_has_its_shares_and_the_tokens_of_our_reader(
    texts: SimpleNamespace,
) -> None:
    training, _ = built(texts, WEIGHTS, samples=600)
    streams = list(map(stream_of, texts.prefixes, training.datasets))
    taken: Counter[int] = Counter()
    for number in range(len(training)):
        sample = training[number]
        source = int(sample["dataset_id"])
        # It cuts the stream into sequences, and its shuffle index says which of them is next.
        start = int(training.datasets[source].shuffle_index[taken[source]]) * SEQUENCE
        tokens = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        assert tokens == streams[source][start : start + SEQUENCE + 1].tolist()
        taken[source] += 1
        shares = [weight * (number + 1) for weight in WEIGHTS]
        assert all(abs(taken[n] - share) <= 1 for n, share in enumerate(shares))
    assert [taken[n] for n in range(3)] == [120, 180, 300]


def test_shards_without_weights_are_each_document_once(
    texts: SimpleNamespace,
) -> None:
    training, validation = built(texts, weights=None, samples=None)
    for number, prefix in enumerate(texts.prefixes):
        parts = [split.datasets[number].document_index for split in (training, validation)]
        documents = sorted(itertools.chain(*(part.tolist() for part in parts)))
        assert documents == list(range(len(IndexedDataset(prefix))))
    seen = Counter(training.dataset_index.tolist())
    assert [seen[n] for n in range(3)] == [len(part) for part in training.datasets]


def test_documents_end_with_what_megatron_takes_for_the_end_of_a_document(
    texts: SimpleNamespace,
) -> None:
    """So that --reset-attention-mask, --reset-position-ids and --eod-mask-loss find it."""
    training, _ = built(texts, WEIGHTS, samples=600)
    end = training.config.tokenizer.eod
    ours = load_tokenizer(texts.tokenizer)
    assert (end, training.config.tokenizer.vocab_size) == (ours.eos_token_id, len(ours))
    for prefix in texts.prefixes:
        documents = IndexedDataset(prefix)
        assert documents.tokens[documents.starts[1:] - 1].tolist() == [end] * len(documents)
        assert Counter(documents.tokens.tolist())[end] == len(documents)
    ends = 0
    for number in range(len(training)):
        sample = training[number]
        found = sample["tokens"] == end
        assert ((sample["loss_mask"] == 0) == found).all()
        for place in found.nonzero().flatten().tolist():
            ends += 1
            assert sample["position_ids"][place + 1 : place + 2].tolist() in ([0], [])
            # What comes after the end does not see what was before it.
            assert sample["attention_mask"][0, place + 1 :, : place + 1].all()
    assert ends > 10
