"""The configurations in configs/, and the command that prints them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain import presets
from alto_ds.pretrain.deepspeed_json import check_values, read_deepspeed_json
from alto_ds.pretrain.presets import Preset
from tests.launcher import ROOT
from tests.pretrain.forked import Forks

CONFIGS = ROOT / "configs"
FILES = presets.files()
PAPER = CONFIGS / "gpt2-medium/paper_alto.json"
SCRIPT = "tests/scripts/make_engines.py"


def command(*arguments: str, status: int = 0) -> str:
    """What the command prints, or says where it refuses; run as ``python -m`` does."""
    output, errors = io.StringIO(), io.StringIO()
    ended = 0
    with (
        patch.object(sys, "argv", ["configs", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_module("alto_ds.configs", run_name="__main__")
        except SystemExit as end:
            ended = int(end.code or 0)
    assert ended == status, errors.getvalue()
    return (errors if status else output).getvalue()


def engines(forks: Forks, paths: list[Path]) -> list[dict[str, Any]]:
    """What DeepSpeed makes of each of the files, with a tiny model."""
    ranks = forks.start(1, *map(str, paths), script=SCRIPT)
    statuses, text = forks.wait(ranks, 300), ranks[0].log.read_text()
    assert statuses == [0], text[-4000:]
    lines = [line for line in text.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def check_engine(made: dict[str, Any], config: dict[str, Any]) -> None:
    params = config["optimizer"]["params"]
    assert made["optimizer"].lower().endswith(config["optimizer"]["type"].lower().rstrip("w"))
    assert made["alpha"] == params.get("alpha")
    assert made["betas"] == params["betas"]
    assert made["schedule"] == "WarmupCosineLR"
    assert made["batch"] == config["train_batch_size"]
    assert made["micro batch"] == config["train_micro_batch_size_per_gpu"]
    assert made["clipping"] == 1.0
    assert made["bf16"] is ("bf16" in config)
    assert made["stage"] == config["zero_optimization"]["stage"]
    assert made["offload"] is ("offload_optimizer" in config["zero_optimization"])


def test_the_files_are_those_of_the_table_and_no_others() -> None:
    committed = {path.relative_to(CONFIGS): path.read_text() for path in CONFIGS.rglob("*.json")}
    assert committed == {path: presets.as_text(config) for path, config in FILES.items()}


def test_there_is_a_file_for_every_size_stage_and_batch() -> None:
    for model in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        names = [f"zero{stage}" for stage in (1, 2, 3)]
        names += ["zero3_offload"] if model in ("gpt2-large", "gpt2-xl") else []
        for name in names:
            for batch_size in (1024, 4096, 16384):
                config = FILES[Path(model, f"{name}_batch{batch_size}.json")]
                assert config["train_batch_size"] == batch_size
                assert config["zero_optimization"]["stage"] == int(name[4])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_deepspeeds_own_models_and_our_checks_take_every_file(path: Path) -> None:
    config = read_deepspeed_json(CONFIGS / path)
    assert config == FILES[path]
    check_values(config)


def test_the_papers_run_has_the_papers_settings() -> None:
    config = json.loads(PAPER.read_text())
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (4096, 4)
    params = config["optimizer"]["params"]
    assert (params["lr"], params["alpha"], params["betas"][0]) == (1e-2, -5, 0.99)
    assert config["gradient_clipping"] == 1.0
    assert config["scheduler"]["params"]["total_num_steps"] == 5000
    beside = {"lamb": ("ALTO", 1e-2), "adam": ("Adam", 6e-4), "adamw": ("AdamW", 8e-4)}
    for name, (kind, lr) in beside.items():
        other = json.loads(PAPER.with_name(f"paper_{name}.json").read_text())
        optimizer = other["optimizer"]
        assert (optimizer["type"], optimizer["params"]["lr"]) == (kind, lr)
        assert other | {"optimizer": config["optimizer"]} == config
        assert name != "lamb" or optimizer["params"] == params | {"alpha": 0}


@pytest.mark.parametrize("batch_size", [1, 64, 1000, 1024, 16384, 65536])
def test_other_batches_see_as_many_sequences_with_a_rate_by_the_square_root(
    batch_size: int,
) -> None:
    config = Preset(model="gpt2", batch_size=batch_size, micro_batch_size=1).config()
    params, schedule = config["optimizer"]["params"], config["scheduler"]["params"]
    assert math.isclose(params["lr"], 1e-2 * math.sqrt(batch_size / 4096), rel_tol=5e-3)
    assert params["alpha"] == (0.5 if batch_size < 1000 else -5)
    assert params["betas"][0] == (0.01 if batch_size < 1000 else 0.99)
    sequences = schedule["total_num_steps"] * batch_size
    assert math.isclose(sequences, 5000 * 4096, rel_tol=2e-3)
    assert schedule["warmup_num_steps"] == 100
    check_values(config)


def test_the_command_prints_files_and_what_lies_between() -> None:
    file = CONFIGS / "gpt2-xl/zero3_batch16384.json"
    assert command("gpt2-xl", "--zero", "3", "--batch", "16384") == file.read_text()
    other = json.loads(command("gpt2", "--batch", "640", "--micro_batch", "5"))
    assert (other["train_batch_size"], other["train_micro_batch_size_per_gpu"]) == (640, 5)


def test_the_command_writes_the_whole_folder(tmp_path: Path) -> None:
    command("--write", str(tmp_path))
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.json")}
    assert written == {path: presets.as_text(config) for path, config in FILES.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "gpt3"}, "gpt3: the model must be one of gpt2, gpt2-medium"),
        ({"zero": 4}, "--zero=4 must be 0, 1, 2 or 3"),
        ({"zero": 2, "offload": True}, "--offload needs --zero=3, not 2"),
        ({"optimizer": "sgd"}, "--optimizer=sgd must be one of alto, lamb"),
        ({"batch_size": 65537}, "--batch=65537 must be from 1 to 65536"),
        ({"batch_size": 0}, "--batch=0 must be from 1 to 65536"),
        ({"batch_size": 1000}, "--batch=1000 must be a multiple of --micro_batch=16"),
        ({"micro_batch_size": 0}, "--micro_batch=0"),
    ],
)
def test_what_no_configuration_can_be_made_of_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Preset(**({"model": "gpt2"} | values))


def test_the_command_refuses_in_one_line() -> None:
    assert (
        command("gpt2", "--zero", "5", status=2)
        .splitlines()[-1]
        .endswith("error: --zero=5 must be 0, 1, 2 or 3")
    )


def test_deepspeed_makes_engines_of_some_files_and_auto_is_of_the_batch(
    forks: Forks, tmp_path: Path
) -> None:
    paths = [Path("gpt2-medium/paper_alto.json"), Path("gpt2-xl/zero3_offload_batch16384.json")]
    written = []
    for number, batch_size in enumerate((4096, 64)):
        config = Preset(model="gpt2", batch_size=batch_size, zero=number + 1).config()
        params = config["optimizer"]["params"]
        config["optimizer"]["params"] = params | {"alpha": "auto", "betas": "auto"}
        written.append(tmp_path / f"{number}.json")
        written[-1].write_text(json.dumps(config))
        config["optimizer"]["params"] = params
    made = engines(forks, [*(CONFIGS / path for path in paths), *written])
    for path, engine in zip(paths, made, strict=False):
        check_engine(engine, FILES[path])
    assert [(engine["alpha"], engine["betas"]) for engine in made[2:]] == [
        (-5, [0.99, 0.9, 0.99]),
        (0.5, [0.01, 0.9, 0.99]),
    ]


@pytest.mark.slow
def test_deepspeed_makes_an_engine_of_every_file(forks: Forks) -> None:
    made = engines(forks, [CONFIGS / path for path in FILES])
    for (path, config), engine in zip(FILES.items(), made, strict=True):
        print(f"{path}: {engine['seconds']:.2f} s")
        check_engine(engine, config)
