"""The order of sequences: from the seed alone, the same for any number of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")

import datasets

from alto_ds.pretrain.data.sequences import Sequences, StoredSequences, make_sequences
from alto_ds.pretrain.ranks import SetupError
from alto_ds.pretrain.settings import DataSettings, ModelSettings, RunSettings, Settings
from alto_ds.pretrain.setup import check_batch_size
from tests.pretrain.runs import TEXTS

pytestmark = pytest.mark.usefixtures("datasets_cache")


def settings(folder: Path, **data: Any) -> Settings:
    """Sequences of 64 tokens of three files, or of what ``data`` names."""
    sources = {} if "dataset" in data else {"text": TEXTS}
    values: dict[str, Any] = {"vocab_size": 400, "validation_fraction": 0.2, **sources, **data}
    return Settings(
        model=ModelSettings(model="gpt2-tiny", seq_length=64),
        data=DataSettings(**values),
        run=RunSettings(output_dir=folder, max_steps=1),
        deepspeed_config={"optimizer": {}},
    )


def prepared(folder: Path, **data: Any) -> Sequences:
    return make_sequences(settings(folder, **data), resumed=False)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> StoredSequences:
    return StoredSequences(settings(tmp_path_factory.mktemp("run")), resumed=False)


def global_batch(data: Sequences, number: int, gas: int, world_size: int) -> list[list[int]]:
    """All sequences of one global batch of 8, put together from all ranks."""
    micros = [
        list(itertools.islice(data.training_batches(number, 8, gas, rank, world_size), gas))
        for rank in range(world_size)
    ]
    return sorted(row for rank in micros for micro in rank for row in micro.tolist())


@pytest.mark.parametrize(("gas", "world_size"), [(1, 2), (4, 1), (2, 4), (8, 1)])
def test_global_batches_do_not_depend_on_ranks(
    sequences: StoredSequences, gas: int, world_size: int
) -> None:
    for number in (0, 5, 10**4):  # the last is epochs later
        expected = global_batch(sequences, number, 1, 1)
        assert global_batch(sequences, number, gas, world_size) == expected


def test_a_resumed_stream_goes_on_where_it_was(sequences: StoredSequences) -> None:
    total = len(sequences._training)
    straight = itertools.islice(sequences.training_batches(0, 8, 1, 0, 1), total // 8 + 5)
    for number, batch in enumerate(straight):  # over the end of the first epoch
        resumed = next(sequences.training_batches(number, 8, 1, 0, 1))
        assert torch.equal(batch, resumed)


def test_an_epoch_holds_every_sequence_once(sequences: StoredSequences) -> None:
    total = len(sequences._training)
    epoch = itertools.islice(sequences.training_batches(0, 1, 1, 0, 1), total)
    seen = sorted(row for batch in epoch for row in batch.tolist())
    assert seen == sorted(sequences._training["input_ids"][:].tolist())


def test_held_out_text_is_not_trained_on(sequences: StoredSequences) -> None:
    training = {tuple(row.tolist()) for row in sequences._training["input_ids"][:]}
    held_out = [tuple(row) for row in sequences.validation.tolist()]
    assert len(held_out) > 10
    assert not training.intersection(held_out)
    assert sequences.validation.shape[1] == 64


def test_tokens_are_the_text(sequences: StoredSequences) -> None:
    text = sequences.tokenizer.decode(sequences.validation[0])
    source = "".join(path.read_text() for path in TEXTS)
    assert all(part in source for part in text.split("<|endoftext|>"))


def test_json_lines_and_streams_of_them(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    datasets.Dataset.from_dict(
        {"body": [f"document {i} of many, and some words more " * 8 for i in range(1200)]}
    ).to_json(path)
    stored = prepared(tmp_path / "a", dataset=str(path), text_column="body")
    assert len(stored.validation) > 100
    streamed = prepared(tmp_path / "b", dataset=str(path), text_column="body", streaming=True)
    straight = itertools.islice(streamed.training_batches(0, 8, 1, 0, 1), 500)
    for number, batch in enumerate(straight):
        if number in (0, 3, 499):  # the last is epochs later
            expected = global_batch(streamed, number, 1, 1)
            assert expected == sorted(batch.tolist())
            assert global_batch(streamed, number, 2, 2) == expected
    short = tmp_path / "short.jsonl"
    datasets.Dataset.from_dict({"body": ["a few words"] * 500}).to_json(short)
    with pytest.raises(ValueError, match="too little text"):
        prepared(tmp_path, dataset=str(short), text_column="body", streaming=True)
    with pytest.raises(ValueError, match="--text_column=text is not in"):
        prepared(tmp_path / "c", dataset=str(path))


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"do not exist: no_such_file\.txt"):
        prepared(tmp_path, text=[*TEXTS, Path("no_such_file.txt")])
    with pytest.raises(ValueError, match=r"does not exist: no_such_file\.jsonl"):
        prepared(tmp_path, dataset="no_such_file.jsonl")


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(ValueError, match=r"has 1 document\(s\)"):
        prepared(tmp_path, text=[short])


def test_a_tokenizer_is_trained_anew_for_another_size_or_text(tmp_path: Path) -> None:
    sizes = [len(prepared(tmp_path, vocab_size=size).tokenizer) for size in (300, 350, 350)]
    assert sizes == [300, 350, 350]
    other = prepared(tmp_path, vocab_size=350, text=TEXTS[:1])
    assert other.tokenizer.get_vocab() != prepared(tmp_path, vocab_size=350).tokenizer.get_vocab()


def test_a_resumed_run_goes_on_with_the_tokenizer_that_it_has(tmp_path: Path) -> None:
    first = prepared(tmp_path, vocab_size=300)
    resumed = make_sequences(settings(tmp_path, vocab_size=350), resumed=True)
    assert resumed.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_runs_on_other_text_have_other_fingerprints(tmp_path: Path) -> None:
    copies = [tmp_path / path.name for path in TEXTS]
    for path, copy in zip(TEXTS, copies, strict=True):
        copy.write_text(path.read_text())
    first = prepared(tmp_path / "a")
    assert prepared(tmp_path / "b", text=copies).fingerprint == first.fingerprint
    copies[0].write_text(copies[0].read_text().replace("argument", "parameter"))
    assert prepared(tmp_path / "c", text=copies).fingerprint != first.fingerprint


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "jsonl"
    folder.mkdir()
    texts = [f"document {i}, and some words more " * 8 for i in range(200)]
    holes = folder / "holes.jsonl"
    datasets.Dataset.from_dict({"text": [*texts[:100], None, "", *texts[100:]]}).to_json(holes)
    data = StoredSequences(settings(tmp_path / "holes", dataset=str(holes)), resumed=False)
    end = data.tokenizer.eos_token_id
    rows = torch.cat([data._training["input_ids"][:], data.validation]).flatten()
    assert not ((rows[1:] == end) & (rows[:-1] == end)).any()
    numbers = folder / "numbers.jsonl"
    datasets.Dataset.from_dict({"text": [1, 2, 3]}).to_json(numbers)
    with pytest.raises(ValueError, match="name a column of text"):
        prepared(tmp_path / "numbers", dataset=str(numbers))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_global_batch_that_ranks_cannot_share_is_refused(world_size: int) -> None:
    config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    check_batch_size(config, world_size)
    with pytest.raises(SetupError, match="train_batch_size=16 is not a multiple"):
        check_batch_size(config, 3)
