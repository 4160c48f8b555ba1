"""DeepSpeed's JSON, unmodified scripts, and Hugging Face Trainer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alto_ds import registration
from tests import launcher

deepspeed = pytest.importorskip("deepspeed")

ALTO = {"type": "ALTO", "params": {"lr": 0.01, "betas": "auto", "alpha": "auto"}}
E = {"type": "E", "params": {"optimizer": "AdamW", "alpha": -5.0, "beta": 0.9, "lr": 0.01}}
SMALL, LARGE = (0.5, (0.01, 0.9, 0.99)), (-5.0, (0.99, 0.9, 0.99))


def config(folder: Path, stage: int, optimizer: dict[str, Any] | None, **more: Any) -> str:
    content = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    } | more
    if optimizer:
        content["optimizer"] = optimizer
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_importing_alto_ds_does_not_import_deepspeed() -> None:
    code = "import alto_ds, sys; assert not any(m.startswith('deepspeed') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "0.20.1+abc", "1.0"])
def test_a_deepspeed_that_was_not_tested_is_warned_of(version: str) -> None:
    with pytest.warns(UserWarning, match=rf"this is {re.escape(version)}\. .*_hp_mapping"):
        registration._check_version(SimpleNamespace(__version__=version))


@pytest.mark.parametrize("version", ["0.19.8", "0.19.10+unknown", deepspeed.__version__])
def test_a_deepspeed_that_was_tested_is_not(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration._check_version(SimpleNamespace(__version__=version))


@pytest.mark.parametrize(("stage", "optimizer"), [(2, ALTO), (3, E)])
def test_an_unmodified_script_runs_through_alto_ds_run(
    tmp_path: Path, stage: int, optimizer: dict[str, Any]
) -> None:
    script = ["tests/scripts/train_plain.py", "--greeting", "hello"]
    arguments = ["--deepspeed", "--deepspeed_config", config(tmp_path, stage, optimizer)]
    output = launcher.run(2, "--module", "alto_ds.run", *script, *arguments, folder=tmp_path)
    found = re.search(r"RESULT hello (\w+) (\S+) (\S+)", output)
    assert found, output[-3000:]
    assert found[1] == optimizer["type"]
    assert float(found[3]) < 0.8 * float(found[2])
    # Both ranks have a global batch of 16, and one says so.
    said = 'ALTO: "auto" stands for alpha=0.5, betas=(0.01, 0.9, 0.99)'
    assert output.count(said) == (optimizer is ALTO)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, SMALL), (999, SMALL), (1000, LARGE)])
def test_auto_becomes_the_papers_settings_for_the_global_batch(
    batch_size: int, expected: tuple[float, tuple[float, float, float]]
) -> None:
    alpha, betas = expected
    for given in ({"alpha": "auto", "betas": "auto"}, {"alpha": "auto"}, {"betas": "auto"}):
        filled = registration.fill_in_auto("ALTO", {"lr": 0.1, **given}, lambda: batch_size)
        assert filled == {"lr": 0.1, "alpha": alpha, "betas": betas}
    # Those of E are its own; betas are the base optimizer's.
    adamw = {"optimizer": "AdamW", "betas": [0.9, 0.95]}
    filled = registration.fill_in_auto("E", adamw | {"alpha": "auto"}, lambda: batch_size)
    assert filled == adamw | {"alpha": alpha, "beta": betas[0]}


def test_auto_leaves_numbers_as_they_are() -> None:
    for given in ({"lr": "auto", "betas": [0.5, 0.6]}, {"alpha": 1.0, "betas": [0.5, 0.6, 0.7]}):
        assert registration.fill_in_auto("ALTO", given, pytest.fail) is given
    for given, expected in (
        ({"alpha": "auto", "betas": [0.5, 0.6, 0.7]}, {"alpha": 0.5, "betas": [0.5, 0.6, 0.7]}),
        ({"alpha": 0.1, "betas": "auto"}, {"alpha": 0.1, "betas": (0.01, 0.9, 0.99)}),
    ):
        assert registration.fill_in_auto("ALTO", given, lambda: 8) == expected


@pytest.mark.parametrize("name", ["ALTO", "E"])
def test_auto_without_an_engine_of_deepspeed_is_refused(name: str) -> None:
    made = getattr(torch.optim, name)
    with pytest.raises(ValueError, match='"auto" needs the global batch of a DeepSpeed JSON'):
        made([torch.nn.Parameter(torch.ones(2))], alpha="auto")


def test_alto_ds_run_names_what_is_missing() -> None:
    for arguments, message in (([], "no script named"), (["none.py"], "no script 'none.py'")):
        run = subprocess.run(
            [sys.executable, "-m", "alto_ds.run", "--local_rank=0", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode != 0
        assert message in run.stderr


@pytest.fixture(scope="module")
def trainer_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What runs of Trainer on 2 ranks left, by the README's routes."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("trainer")
    # Trainer insists that eps in the JSON be Adam's: leave it to ALTO. It refuses "auto" for alpha.
    alto = {"type": "ALTO", "params": {"lr": "auto", "weight_decay": "auto", "alpha": -5}}
    auto = {"type": "ALTO", "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto"}}
    paths = []
    for name, optimizer in (("json", alto), ("class", None), ("auto", auto)):
        (folder / name).mkdir()
        paths.append(config(folder / name, 2, optimizer, gradient_accumulation_steps="auto"))
    output = launcher.run(
        2, "tests/scripts/train_with_trainer.py", *paths, str(folder), folder=folder
    )
    found = re.search(r"RESULT (.*)", output)
    assert found, output[-3000:]
    return json.loads(found[1])


@pytest.mark.parametrize("route", ["json", "class"])
def test_trainer_trains_with_alto_on_two_ranks(trainer_runs: Any, route: str) -> None:
    run = trainer_runs[route]
    assert run["optimizer"] == "ALTO"
    assert run["ranks"] == 2
    assert run["layers"] == run["parameters"]
    assert run["losses"][-1] < 0.8 * run["losses"][0]
    assert not run["warnings"]
    # The JSON's route has one group; Trainer's own splits off what is not decayed.
    if route == "json":
        assert run["groups"] == 1
        assert run["scaled"] == run["layers"]
    else:
        assert run["groups"] == 2
        assert run["scaled"] == [
            name for name in run["layers"] if "bias" not in name and ".ln_" not in name
        ]


def test_auto_in_trainers_json_is_of_the_global_batch(trainer_runs: Any) -> None:
    assert trainer_runs["json"]["alpha, betas"] == [-5, [0.99, 0.9, 0.99]]
    found = trainer_runs["json with auto, Trainer's own weight_decay"]["alpha, betas"]
    assert found == [0.5, [0.01, 0.9, 0.99]]


def test_with_trainers_own_weight_decay_of_0_all_layers_are_scaled(trainer_runs: Any) -> None:
    run = trainer_runs["json with auto, Trainer's own weight_decay"]
    assert run["scaled"] == run["layers"] == run["parameters"]
    assert len(run["warnings"]) == 1
