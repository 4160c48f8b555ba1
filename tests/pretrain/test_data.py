"""The order of sequences: from the seed alone, the same for any number of ranks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("deepspeed")

import datasets

from alto_ds.pretrain.data.sequences import Sequences, StoredSequences, make_sequences
from alto_ds.pretrain.data.tokenizer import load_tokenizer
from alto_ds.pretrain.ranks import SetupError
from alto_ds.pretrain.settings import DataSettings, ModelSettings, RunSettings, Settings
from alto_ds.pretrain.setup import check_batch_size
from tests.pretrain.forked import Forks
from tests.pretrain.runs import TEXTS, measured, options
from tests.pretrain.stream_ranks import BATCH_SIZE, FIRST, take

TAKE = "tests/pretrain/stream_ranks.py"

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
            assert global_batch(streamed, number, 1, 1) == sorted(batch.tolist())
    short = tmp_path / "short.jsonl"
    datasets.Dataset.from_dict({"body": ["a few words"] * 500}).to_json(short)
    with pytest.raises(ValueError, match="too little text"):
        prepared(tmp_path, dataset=str(short), text_column="body", streaming=True)
    with pytest.raises(ValueError, match="--text_column=text is not in"):
        prepared(tmp_path / "c", dataset=str(path))


# Streams, and how many documents each of their files has.
STREAMS = {"one.jsonl": [1900], "three": [900, 700, 250], "many": [60] * 20, "broken": [600, 100]}


def write_streams(folder: Path) -> dict[str, list[list[str]]]:
    """The documents of each file of each stream, all of them different."""
    found = {}
    for name, sizes in STREAMS.items():
        files = [
            [
                f"{name} {file} {i}: some words, {'and more of them, ' * (i % 7)}"
                for i in range(size)
            ]
            for file, size in enumerate(sizes)
        ]
        single = name.endswith(".jsonl")
        for number, texts in enumerate(files):
            path = folder / name if single else folder / name / f"{number:02}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found[name] = files
    return found


def turns_by_hand(name: str, files: list[list[str]]) -> list[list[str]]:
    """The training documents of each turn: 1,000 of them, as many of each of at most 16 parts."""
    parts = files
    if name == "many":  # the first four parts have two of the 20 files
        parts = [files[2 * n] + files[2 * n + 1] for n in range(4)] + files[8:]
    parts = [parts[0][500:], *parts[1:]]
    size = -(-1000 // len(parts))
    turns = range(-(-max(map(len, parts)) // size))
    return [[text for part in parts for text in part[n * size : (n + 1) * size]] for n in turns]


def packed_by_hand(turn: list[str], tokenizer: Any) -> list[list[int]]:
    documents = [[*tokenizer.backend_tokenizer.encode(x).ids, tokenizer.eos_token_id] for x in turn]
    tokens = [token for document in documents for token in document]
    return [tokens[i : i + 64] for i in range(0, len(tokens) - 63, 64)]


def test_ranks_share_a_stream_and_have_the_batches_that_one_has(
    folder: Path, forks: Forks, tmp_path: Path
) -> None:
    files = write_streams(tmp_path)
    names = [str(tmp_path / name) for name in files]
    tokenizer = tmp_path / "run" / "tokenizer"
    prepared(tmp_path / "run")  # trains it
    streams = {
        name: prepared(tmp_path / "run", dataset=name, streaming=True, tokenizer=str(tokenizer))
        for name in names
    }
    expected = {
        name: {first: take(stream, first, 0, 1).flatten(1, 2) for first in FIRST}
        for name, stream in streams.items()
    }
    turns = {name: turns_by_hand(Path(name).name, files[Path(name).name]) for name in names}
    for name, stream in streams.items():
        epoch = [row for turn in turns[name] for row in packed_by_hand(turn, stream.tokenizer)]
        for first in FIRST:
            start = first * BATCH_SIZE
            rows = list(itertools.islice(itertools.cycle(epoch), start, start + 2 * BATCH_SIZE))
            assert torch.equal(expected[name][first].flatten(0, 1), torch.tensor(rows))
    words = options(tmp_path, "output", seq_length=64, tokenizer=tokenizer)
    words = [*words[: words.index("--text")], "--dataset", names[0], "--streaming"]
    for count, shown in ((2, names), (3, names[:-1])):
        ranks = forks.start(count, str(tmp_path), ",".join(shown), *words, script=TAKE)
        assert forks.wait(ranks, 100) == [0] * count, ranks[0].log.read_text()
        found = [torch.load(tmp_path / f"{rank}-of-{count}.pt") for rank in range(count)]
        for name in shown:
            for first in FIRST:
                micros = torch.stack([rank[name]["batches"][first] for rank in found], dim=2)
                assert torch.equal(micros.flatten(1, 3), expected[name][first]), (name, first)
            # Each document is tokenized by one rank, and each rank has some.
            shares = [rank[name]["read"] for rank in found]
            assert all(shares)
            assert Counter(itertools.chain(*shares)) == Counter(turns[name][0])
        sizes = [len(rank[names[0]]["read"]) for rank in found]
        assert max(sizes) - min(sizes) <= 1
        if "broken" in shown[-1]:
            errors = [rank[shown[-1]]["error"] for rank in found]
            assert errors[0] == errors[1]
            assert errors[0].startswith(f"rank 1: --dataset={shown[-1]} cannot be read on: JSON ")


@pytest.mark.slow
def test_a_run_on_a_stream_resumes_on_another_number_of_ranks(forks: Forks, tmp_path: Path) -> None:
    write_streams(tmp_path)
    for output, runs in {"changed": [(2, 6), (1, 9)], "straight": [(1, 9)]}.items():
        for ranks, steps in runs:
            words = options(tmp_path, output, dropout=0.0, max_steps=steps)
            words = [*words[: words.index("--text")], "--dataset", str(tmp_path / "three")]
            forks.run(ranks, *words, "--streaming")
    losses = [[row["loss"] for row in measured(tmp_path / n)] for n in ("changed", "straight")]
    assert len(losses[0]) == 9
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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


def test_a_tokenizer_that_cuts_sentences_leaves_documents_whole(tmp_path: Path) -> None:
    whole = prepared(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    tokenizer.backend_tokenizer.enable_truncation(max_length=8)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.save_pretrained(tmp_path / "cutting")
    named = prepared(tmp_path, tokenizer=str(tmp_path / "cutting"))
    assert torch.equal(named.validation, whole.validation)


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
