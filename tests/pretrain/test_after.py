"""What a trained model is good for: perplexities and samples, of a run or of its checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from transformers import GPT2Config, GPT2LMHeadModel

from alto_ds.pretrain import evaluate, sample
from alto_ds.pretrain.evaluate import loss_of, windows
from alto_ds.pretrain.model import IGNORED
from alto_ds.pretrain.trained import Trained, load_trained
from tests.in_process import call
from tests.pretrain.forked import Forks
from tests.pretrain.runs import STEPS, TEXTS, measured, options, weights


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 12, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).eval()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 30])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (8, 1), (7, 5), (1, 1)])
def test_each_token_is_predicted_once_from_the_ones_before_it(
    count: int, length: int, stride: int
) -> None:
    tokens = [100 + i for i in range(count)]
    predicted = []
    for given, targets in windows(tokens, length, stride):
        assert len(given) == len(targets) <= length
        for position, target in enumerate(targets.tolist()):
            if target != IGNORED:
                predicted.append(target)
                context = given[: position + 1].tolist()
                assert context == list(range(target - len(context), target))
                # As much context as the windows leave: all of it, or at least what they share.
                assert len(context) >= min(target - 100, length - stride + 1)
    assert predicted == tokens[1:]


@pytest.mark.parametrize(("length", "stride", "batch"), [(12, 12, 1), (12, 5, 3), (8, 4, 8)])
def test_the_loss_is_that_of_one_token_after_the_other(
    model: GPT2LMHeadModel, length: int, stride: int, batch: int
) -> None:
    torch.manual_seed(2)
    documents = [torch.randint(64, (count,)).tolist() for count in (40, 1, 9, 25)]
    expected = 0.0
    for tokens in documents:
        for target in range(1, len(tokens)):
            # The first window that reaches this token.
            window = max(math.ceil((target - length) / stride), 0)
            given = torch.tensor([tokens[window * stride : target]])
            with torch.no_grad():
                expected -= model(given).logits[0, -1].log_softmax(-1)[tokens[target]].item()
    total, count = loss_of(model, documents, length, stride, batch)
    assert count == sum(len(tokens) - 1 for tokens in documents)
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def run(folder: Path, straight: str) -> Path:
    return folder / "straight"


@pytest.mark.parametrize(("name", "step"), [("", STEPS), ("checkpoints/step0000010", 10)])
def test_a_run_predicts_its_held_out_text_as_it_said(
    name: str,
    step: int,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = json.loads(call(evaluate, monkeypatch, capsys, str(run / name)).out)
    said = {row["step"]: row.get("val_loss") for row in measured(run)}
    assert found["loss"] == pytest.approx(said[step], rel=1e-5)
    assert found["word_perplexity"] is None


@pytest.mark.parametrize(
    "stage",
    [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_a_checkpoint_is_the_model_that_was_saved_after_it(
    stage: int, run: Path, tmp_path: Path, forks: Forks
) -> None:
    if stage != 2:
        arguments = options(tmp_path, "run", stage=2)
        config = json.loads((tmp_path / "zero2.json").read_text())
        config["zero_optimization"]["stage"] = stage
        (tmp_path / "zero2.json").write_text(json.dumps(config))
        forks.run(1, *arguments)
        run = tmp_path / "run"
    name = f"checkpoints/step{STEPS:07d}"
    of_checkpoint = load_trained(str(run / name))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    newest = load_trained(str(copy))
    assert newest.source == str(copy / name)
    for trained in (of_checkpoint, newest):
        found = trained.model.state_dict()
        assert trained.tokenizer.eos_token_id == trained.model.config.eos_token_id
        for key, value in weights(run).items():
            torch.testing.assert_close(found[key].cpu(), value, rtol=0, atol=0)
    for path in (copy / name).glob("*model_states.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{STEPS:07d} is not whole: "):
        load_trained(str(copy / name))


def test_samples_of_no_temperature_are_the_likeliest_tokens(model: GPT2LMHeadModel) -> None:
    tokenizer = Letters()
    found = sample.sample(Trained(model, tokenizer, 12, ""), "abc", 5, temperature=0.0, top_k=0)
    tokens = [0, *tokenizer("abc")["input_ids"]]
    for _ in range(5):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 0:
            break
    assert found == tokenizer.decode(tokens[1:])
    assert len(sample.sample(Trained(model, tokenizer, 12, ""), "abc", 99, 0.0, 0)) <= 11
    with pytest.raises(ValueError, match="--prompt has 12 tokens; the model takes 10 at most"):
        sample.sample(Trained(model, tokenizer, 12, ""), "a" * 12, 5, 0.0, 0)


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 64 for letter in text]}

    def decode(self, tokens: Any, **_: Any) -> str:
        return "".join(chr(64 + int(token)) for token in tokens if token)


def test_the_commands_say_what_they_find(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = call(evaluate, monkeypatch, capsys, str(run), "--text", str(TEXTS[0]))
    row = json.loads(found.out)
    words = len(TEXTS[0].read_text().split())
    assert row["words"] == words
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert math.log(row["word_perplexity"]) == pytest.approx(row["loss"] * row["tokens"] / words)
    assert f"perplexity {row['perplexity']:.2f} by token" in found.err
    options = ["--prompt", "def ", "--max_new_tokens", "8"]
    texts = {
        seed: call(sample, monkeypatch, capsys, str(run), *options, "--seed", seed).out
        for seed in ("1", "2")
    }
    assert texts["1"] != texts["2"]
    assert texts["1"] == call(sample, monkeypatch, capsys, str(run), *options, "--seed", "1").out
    assert texts["1"].startswith("def ")


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (evaluate, ["RUN", "--text", "nothing.txt"], "No such file or directory: 'nothing.txt'"),
        (evaluate, ["RUN", "--text", "EMPTY"], "has no words"),
        (evaluate, ["MODEL"], "name a text by --text"),
        (evaluate, ["RUN", "--tokenizer", "MODEL"], "--tokenizer goes with --text"),
        (evaluate, ["RUN", "--text", "TEXT", "--stride", "33"], "--stride=33 must be from 1 to 32"),
        (evaluate, ["RUN", "--text", "TEXT", "--seq_length", "0"], "--seq_length=0 must be from 1"),
        (evaluate, ["/nothing/here", "--text", "TEXT"], "/nothing/here has no "),
        (sample, ["RUN", "--temperature", "-1"], "--temperature=-1.0 must be at least 0"),
        (sample, ["RUN", "--prompt", "x\n" * 99], "the model takes 30 at most"),
        (sample, ["EMPTY"], "has no "),
    ],
)
def test_wrong_options_are_named(
    module: Any,
    words: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.txt").write_text(" ")
    places = {"RUN": run, "MODEL": run / "model", "TEXT": TEXTS[0], "EMPTY": tmp_path / "empty.txt"}
    arguments = [str(places.get(word, word)) for word in words]
    found = call(module, monkeypatch, capsys, *arguments)
    assert found.status == 2
    assert message in found.err.splitlines()[-1]
