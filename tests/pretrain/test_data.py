"""The order of sequences: from the seed alone, the same for any number of ranks."""

from __future__ import annotations

import argparse
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")

import datasets

from alto_ds.pretrain.data import Sequences
from alto_ds.pretrain.loop import check_batch_size, parse_arguments
from alto_ds.pretrain.ranks import SetupError
from tests.launcher import ROOT

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    saved = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = saved


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    texts = [str(STDLIB / name) for name in ("argparse.py", "ast.py", "inspect.py")]
    return parse_arguments(
        [
            *("--model", "gpt2-tiny", "--output_dir", str(folder), "--vocab_size", "400"),
            *("--deepspeed_config", str(ROOT / "configs/gpt2_tiny_zero2.json")),
            *("--seq_length", "64", "--validation_fraction", "0.2"),
            *(more if "--dataset" in more else ("--text", *texts, *more)),
        ]
    )


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return Sequences(arguments(tmp_path_factory.mktemp("run")))


def global_batch(data: Sequences, number: int, gas: int, world_size: int) -> list[list[int]]:
    """All sequences of one global batch of 8, put together from all ranks."""
    micros = [
        list(itertools.islice(data.training_batches(number, 8, gas, rank, world_size), gas))
        for rank in range(world_size)
    ]
    return sorted(row for rank in micros for micro in rank for row in micro.tolist())


@pytest.mark.parametrize(("gas", "world_size"), [(1, 2), (4, 1), (2, 4), (8, 1)])
def test_global_batches_do_not_depend_on_ranks(
    sequences: Sequences, gas: int, world_size: int
) -> None:
    for number in (0, 5, 10**4):  # the last is epochs later
        expected = global_batch(sequences, number, 1, 1)
        assert global_batch(sequences, number, gas, world_size) == expected


def test_a_resumed_stream_goes_on_where_it_was(sequences: Sequences) -> None:
    total = len(sequences._training)
    straight = itertools.islice(sequences.training_batches(0, 8, 1, 0, 1), total // 8 + 5)
    for number, batch in enumerate(straight):  # over the end of the first epoch
        resumed = next(sequences.training_batches(number, 8, 1, 0, 1))
        assert torch.equal(batch, resumed)


def test_an_epoch_holds_every_sequence_once(sequences: Sequences) -> None:
    total = len(sequences._training)
    epoch = itertools.islice(sequences.training_batches(0, 1, 1, 0, 1), total)
    seen = sorted(row for batch in epoch for row in batch.tolist())
    assert seen == sorted(sequences._training["input_ids"][:].tolist())


def test_held_out_text_is_not_trained_on(sequences: Sequences) -> None:
    training = {tuple(row.tolist()) for row in sequences._training["input_ids"][:]}
    held_out = [tuple(row) for row in sequences.validation.tolist()]
    assert len(held_out) > 10
    assert not training.intersection(held_out)
    assert sequences.validation.shape[1] == 64


def test_tokens_are_the_text(sequences: Sequences) -> None:
    text = sequences.tokenizer.decode(sequences.validation[0])
    source = "".join((STDLIB / n).read_text() for n in ("argparse.py", "ast.py", "inspect.py"))
    assert all(part in source for part in text.split("<|endoftext|>"))


def test_json_lines_and_streams_of_them(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    datasets.Dataset.from_dict(
        {"body": [f"document {i} of many, and some words more " * 8 for i in range(1200)]}
    ).to_json(path)
    options = ("--dataset", str(path), "--text_column", "body")
    stored = Sequences(arguments(tmp_path / "a", *options))
    assert len(stored.validation) > 100
    streamed = Sequences(arguments(tmp_path / "b", *options, "--streaming"))
    straight = itertools.islice(streamed.training_batches(0, 8, 1, 0, 1), 500)
    for number, batch in enumerate(straight):
        if number in (0, 3, 499):  # the last is epochs later
            expected = global_batch(streamed, number, 1, 1)
            assert expected == sorted(batch.tolist())
            assert global_batch(streamed, number, 2, 2) == expected
    short = tmp_path / "short.jsonl"
    datasets.Dataset.from_dict({"body": ["a few words"] * 500}).to_json(short)
    with pytest.raises(ValueError, match="too little text"):
        Sequences(arguments(tmp_path, "--dataset", str(short), *options[2:], "--streaming"))
    with pytest.raises(ValueError, match="--text_column=text is not in"):
        Sequences(arguments(tmp_path / "c", "--dataset", str(path)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "no_such_file.txt"], "do not exist: no_such_file.txt"),
        (["--dataset", "no_such_file.jsonl"], "does not exist: no_such_file.jsonl"),
        (["--streaming"], "--streaming goes with --dataset"),
    ],
)
def test_text_that_is_not_there_is_named(tmp_path: Path, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences(arguments(tmp_path, *more))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(ValueError, match=r"has 1 document\(s\)"):
        Sequences(arguments(tmp_path, "--text", str(short)))


def test_a_tokenizer_is_trained_anew_for_another_size_or_text(tmp_path: Path) -> None:
    sizes = [
        len(Sequences(arguments(tmp_path, "--vocab_size", size)).tokenizer)
        for size in ("300", "350", "350")
    ]
    assert sizes == [300, 350, 350]


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "jsonl"
    folder.mkdir()
    texts = [f"document {i}, and some words more " * 8 for i in range(200)]
    holes = folder / "holes.jsonl"
    datasets.Dataset.from_dict({"text": [*texts[:100], None, "", *texts[100:]]}).to_json(holes)
    data = Sequences(arguments(tmp_path / "holes", "--dataset", str(holes)))
    end = data.tokenizer.eos_token_id
    rows = torch.cat([data._training["input_ids"][:], data.validation]).flatten()
    assert not ((rows[1:] == end) & (rows[:-1] == end)).any()
    numbers = folder / "numbers.jsonl"
    datasets.Dataset.from_dict({"text": [1, 2, 3]}).to_json(numbers)
    with pytest.raises(ValueError, match="name a column of text"):
        Sequences(arguments(tmp_path / "numbers", "--dataset", str(numbers)))


def test_a_configuration_without_optimizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 8}')
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--deepspeed_config", str(path))
    assert 'has no "optimizer"' in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_global_batch_that_ranks_cannot_share_is_refused(world_size: int) -> None:
    config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    check_batch_size(config, world_size)
    with pytest.raises(SetupError, match="train_batch_size=16 is not a multiple"):
        check_batch_size(config, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--deepspeed_config", "none.json"], "none.json is no file"),
        (["--seq_length", "129"], "gpt2-tiny takes 128"),
        (["--validation_fraction", "1.5"], "must be in"),
        (["--max_steps", "0"], "must be at least 1"),
        (["--seq_length", "1"], "must be at least 2"),  # no token to predict
        (["--vocab_size", "256"], "must be at least 257"),
        (["--dataset", "x", "--text", "y"], "give one of them"),
    ],
)
def test_wrong_arguments_end_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(
            [
                *("--model", "gpt2-tiny", "--output_dir", str(tmp_path)),
                *("--deepspeed_config", str(ROOT / "configs/gpt2_tiny_zero2.json"), *wrong),
            ]
        )
    assert message in capsys.readouterr().err
