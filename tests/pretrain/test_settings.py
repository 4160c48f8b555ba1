"""The settings of the main job, from the command line or made in Python."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from alto_ds.pretrain.command import parse_arguments
from alto_ds.pretrain.settings import DataSettings, ModelSettings, RunSettings, Settings
from tests.launcher import ROOT

CONFIG = ROOT / "configs/gpt2-tiny/zero2.json"


def parsed(*more: str, config: Path = CONFIG) -> Settings:
    required = ("--model", "gpt2-tiny", "--output_dir", "out", "--deepspeed_config", str(config))
    return parse_arguments([*required, *more])


def test_options_that_are_not_given_have_the_defaults_of_the_settings() -> None:
    config = json.loads(CONFIG.read_text())
    assert parsed() == Settings(
        model=ModelSettings(model="gpt2-tiny"),
        data=DataSettings(),
        run=RunSettings(output_dir=Path("out")),
        deepspeed_config=config,
    )


def test_options_that_are_given_reach_the_settings() -> None:
    settings = parsed(
        *("--seq_length", "64", "--dropout", "0.1", "--text", "a.txt", "b.txt"),
        *("--vocab_size", "300", "--max_steps", "7", "--timeout", "30", "--local_rank", "0"),
    )
    assert settings.model == ModelSettings(model="gpt2-tiny", seq_length=64, dropout=0.1)
    assert settings.data == DataSettings(text=[Path("a.txt"), Path("b.txt")], vocab_size=300)
    assert settings.run == RunSettings(output_dir=Path("out"), max_steps=7, timeout=30)


def test_every_setting_is_an_option() -> None:
    options = {
        "streaming": ["--dataset", "d", "--streaming"],
        "verify_data": ["--data", "d", "--verify_data"],
        "encoding": ["--text", "a.txt", "--encoding", "latin-1"],
        "fresh_states": ["--fresh_states"],
        "trust_ratios_by_layer": ["--trust_ratios_by_layer"],
        "compile": ["--compile"],
        "activation_checkpointing": ["--activation_checkpointing"],
        "text": ["--text", "7"],
        "n_embd": ["--n_embd", "8"],
        "n_head": ["--n_head", "8"],
        "model": ["--model", "gpt2"],
        "validation_fraction": ["--validation_fraction", "0.7"],
        "dropout": ["--dropout", "0.7"],
        "vocab_size": ["--vocab_size", "700"],
    }
    for part in ("model", "data", "run"):
        for field in dataclasses.fields(getattr(parsed(), part)):
            changed = parsed(*options.get(field.name, [f"--{field.name}", "7"]))
            old, new = (getattr(getattr(s, part), field.name) for s in (parsed(), changed))
            assert old != new, field.name


def test_sizes_are_free_and_those_of_a_name_are_its_own(tmp_path: Path) -> None:
    tiny = {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 128}
    assert parsed().model.architecture == tiny
    model = parsed("--n_layer", "3", "--n_embd", "64", "--n_head", "8").model
    assert model.architecture == tiny | {"n_layer": 3, "n_embd": 64, "n_head": 8}
    assert model.identity == model.architecture
    assert parsed("--n_layer", "2").model.identity == "gpt2-tiny"
    path = tmp_path / "config.json"
    # As Hugging Face writes it; what is not of the architecture is the run's affair.
    of_hub = {"model_type": "gpt2", "vocab_size": 50257, "attn_pdrop": 0.1, "n_inner": None}
    path.write_text(json.dumps(of_hub | tiny | {"layer_norm_epsilon": 1e-6}))
    model = parsed("--model", str(path), "--n_layer", "1").model
    assert model.architecture == tiny | {"n_layer": 1, "layer_norm_epsilon": 1e-6}
    assert model.length == 128
    assert "vocab_size" not in model.architecture


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"n_layers": 2}, "config.json has no n_layer"),
        ({"model_type": "llama"}, "config.json is of llama; name the config.json of a GPT-2"),
        (["gpt2"], "config.json is of no object"),
        ({"n_head": "4"}, "n_head='4' must be of type int"),
        ({"n_head": 5}, "--n_embd=16 must be a multiple of --n_head=5"),
        ({"n_layer": 0}, "--n_layer=0 must be at least 1"),
        ({"n_positions": 8}, "config.json takes 8 tokens at most"),
        ({"scale_attn_weights": 1}, "scale_attn_weights=1 must be of type bool"),
        (
            {"activation_function": "gleu"},
            "activation_function='gleu' is not known to transformers",
        ),
    ],
)
def test_a_config_json_that_does_not_fit_is_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    if isinstance(content, dict):
        size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}
        content = content if "n_layers" in content else size | content
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelSettings(model=str(tmp_path / "config.json"), seq_length=16)


def test_auto_is_taken_in_the_json_of_alto_and_of_e(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = json.loads(CONFIG.read_text())
    for params in ({"alpha": "auto"}, {"betas": "auto"}, {"alpha": "auto", "betas": "auto"}):
        config["optimizer"] = {"type": "ALTO", "params": params}
        path.write_text(json.dumps(config))
        assert parsed(config=path).deepspeed_config == config  # DeepSpeed reads it unaltered
    config["optimizer"] = {"type": "E", "params": {"alpha": "auto", "beta": "auto", "lr": 0.1}}
    path.write_text(json.dumps(config))
    assert parsed(config=path).deepspeed_config == config


def test_what_is_left_to_model_and_schedule_is_derived() -> None:
    settings = parsed()
    assert (settings.model.length, settings.steps, settings.warmup_steps) == (128, 300, 20)
    settings = parsed("--seq_length", "16", "--max_steps", "3")
    assert (settings.model.length, settings.steps, settings.warmup_steps) == (16, 3, 20)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--deepspeed_config", "none.json"], "none.json is no file"),
        (["--seq_length", "129"], "--seq_length=129: gpt2-tiny takes 128"),
        (["--validation_fraction", "1.5"], "--validation_fraction=1.5 must be in"),
        (["--max_steps", "0"], "--max_steps=0 must be at least 1"),
        (["--seq_length", "1"], "--seq_length=1 must be at least 2"),  # no token to predict
        (["--vocab_size", "256"], "--vocab_size=256 must be at least 257"),
        (["--dataset", "x", "--text", "y"], "give one of them"),
        (["--streaming"], "--streaming goes with --dataset"),
        (["--dropout", "1"], "--dropout=1.0 must be in [0, 1)"),
    ],
)
def test_wrong_arguments_end_with_a_message(
    capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parsed(*wrong)
    printed = capsys.readouterr().err
    assert "alto_ds.pretrain: error: " in printed
    assert message in printed


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelSettings, {"model": "gpt3"}, "--model=gpt3 must be one of gpt2-tiny, gpt2, "),
        (ModelSettings, {"model": "gpt2", "seq_length": 1025}, "gpt2 takes 1024"),
        (RunSettings, {"output_dir": Path(), "timeout": 0}, "--timeout=0 must be at least 1"),
    ],
)
def test_settings_made_in_python_are_checked_as_well(
    kind: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_configuration_without_optimizer_or_number_of_steps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    for config, message in (
        ({"train_batch_size": 8}, 'has no "optimizer"'),
        ({"optimizer": {}}, "--max_steps is needed"),
        ({"optimizer": {}, "scheduler": {"params": {"total_num_steps": None}}}, "but None"),
        ({"optimizer": {}, "scheduler": {"params": {"total_num_steps": "auto"}}}, "but 'auto'"),
    ):
        path.write_text(json.dumps(config))
        with pytest.raises(SystemExit):
            parsed(config=path)
        assert message in capsys.readouterr().err
