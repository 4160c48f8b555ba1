"""The main job: metrics, resuming, ranks, ZeRO stages, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from alto_ds.pretrain.metrics import read_metrics
from tests import launcher
from tests.pretrain.forked import Forks
from tests.pretrain.runs import MODULE, STEPS, measured, options, weights


def test_a_run_leaves_metrics_curves_a_model_and_the_newest_checkpoints(
    folder: Path, straight: str
) -> None:
    rows = read_metrics(folder / "straight/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert all(keys <= row.keys() for row in rows)
    assert rows[-1]["tokens"] == STEPS * 8 * 32
    evaluated = [row for row in rows if "val_ppl" in row]
    assert [row["step"] for row in evaluated] == [2, 5, 10, 12]  # 2: after the warm-up
    assert evaluated[-1]["val_ppl"] < evaluated[0]["val_ppl"]
    assert rows[-1]["lr"] < max(row["lr"] for row in rows) == pytest.approx(0.02)
    assert (folder / "straight/curves.png").stat().st_size > 10_000
    assert f"Final held-out perplexity {rows[-1]['val_ppl']:.2f}" in straight
    assert "ppl=" in straight  # of the progress bar
    model = weights(folder / "straight")
    assert model["transformer.wte.weight"].shape == (448, 128)  # 400 tokens, in multiples of 64
    kept = sorted(path.name for path in (folder / "straight/checkpoints").glob("step*"))
    assert kept == ["step0000010", "step0000012"]


def test_deepspeeds_own_tool_makes_plain_weights_of_a_checkpoint(
    folder: Path, straight: str
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(folder / "straight/checkpoints"))
    model = weights(folder / "straight")
    assert all(torch.equal(found[name], model[name]) for name in model)


def test_an_evaluation_says_how_matrices_and_embeddings_are_scaled(
    folder: Path, straight: str
) -> None:
    keys = ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max", "layers_scaled")
    for row in read_metrics(folder / "straight/metrics.jsonl"):
        assert all((key in row) is ("val_loss" in row) for key in keys)
        if "val_loss" not in row:
            continue
        low, median, high, layers = (row[key] for key in keys)
        assert 0 < low < median < high
        assert layers == 2 + 2 * 4  # two embeddings; four matrices in each of two blocks
        assert f"median trust ratio {median:.3g}" in straight


@pytest.mark.parametrize(("base", "stage", "reported"), [("AdamW", 2, False), ("ALTO", 0, True)])
def test_trust_ratios_are_reported_where_the_optimizer_in_e_has_them(
    tmp_path: Path, forks: Forks, base: str, stage: int, reported: bool
) -> None:
    arguments = options(tmp_path, "output", max_steps=2)
    path = tmp_path / "zero2.json"
    params = {"optimizer": base, "alpha": -5, "beta": 0.99, "lr": 1e-3, "weight_decay": 0.01}
    changed = {
        "optimizer": {"type": "E", "params": params},
        "zero_optimization": {"stage": stage},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    forks.run(1, *arguments)
    last = read_metrics(tmp_path / "output/metrics.jsonl")[-1]
    assert "val_loss" in last
    assert ("layers_scaled" in last) is ("trust_ratio_median" in last) is reported


def test_a_run_that_was_interrupted_goes_on_bitwise(
    folder: Path, straight: str, forks: Forks
) -> None:
    """Ctrl-C as a terminal sends it; dropout and the optimizer's states go on as well."""
    arguments = options(folder, "interrupted")
    process = launcher.start(2, "--module", MODULE, *arguments, folder=folder)
    metrics = folder / "interrupted/metrics.jsonl"
    deadline = time.monotonic() + 200
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    done = len(read_metrics(metrics))
    assert 3 <= done < STEPS, output[-3000:]
    assert f"Stopped after step {done}; the same command goes on from there." in output
    assert "Final held-out perplexity" in forks.run(2, *arguments)
    assert measured(folder / "interrupted") == measured(folder / "straight")
    left, right = weights(folder / "straight"), weights(folder / "interrupted")
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_trained_alike(left: Path, right: Path) -> None:
    """Losses and weights are the same but for the order of sums."""
    for row, other in zip(measured(left), measured(right), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), row["step"]
        assert row.get("val_loss", 0) == pytest.approx(other.get("val_loss", 0), rel=1e-4)
    found, expected = weights(left), weights(right)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], expected[n], rtol=1e-2, atol=1e-3) for n in found)


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_stages_train_alike(folder: Path, straight: str, forks: Forks, stage: int) -> None:
    forks.run(2, *options(folder, f"zero{stage}", stage))
    assert_trained_alike(folder / f"zero{stage}", folder / "straight")


@pytest.fixture(scope="module")
def both(folder: Path, forks: Forks) -> tuple[Path, Path]:
    """A run on one rank, and on two, without dropout, whose chance each rank draws for itself."""
    for ranks in (1, 2):
        forks.run(ranks, *options(folder, f"{ranks}-ranks", dropout=0.0))
    return folder / "1-ranks", folder / "2-ranks"


def test_one_rank_trains_as_two_do(both: tuple[Path, Path]) -> None:
    assert_trained_alike(*both)


def back_at_step_10(run: Path, copy: Path) -> None:
    """A copy of a run that was stopped after its checkpoint of step 10."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints/step0000012")
    shutil.rmtree(copy / "model")


def test_a_run_goes_on_with_another_number_of_ranks_stage_and_precision(
    both: tuple[Path, Path], tmp_path: Path, forks: Forks
) -> None:
    back_at_step_10(both[1], tmp_path / "run")
    output = forks.run(1, *options(tmp_path, "run", stage=3, dropout=0.0))
    assert "resuming from" in output
    assert (
        "step0000010 was written on 2 ranks, ZeRO stage 2, float32; it is converted to 1 rank, "
        "ZeRO stage 3, float32, with all optimizer states" in output
    )
    for row, other in zip(measured(tmp_path / "run"), measured(both[1]), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["lr"] == other["lr"]
    assert_trained_alike(tmp_path / "run", both[1])
    assert not list((tmp_path / "run/checkpoints").glob(".*"))  # what was converted is gone


def test_a_compiled_run_trains_as_an_eager_one_and_goes_on_bitwise(
    both: tuple[Path, Path], tmp_path: Path, forks: Forks
) -> None:
    arguments = [*options(tmp_path, "run", dropout=0.0), "--compile", "--profile", "2"]
    forks.run(1, *arguments)
    compiled, eager = measured(tmp_path / "run"), measured(both[0])
    for row, other in zip(compiled, eager, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert compiled != eager  # which rounds in another order: it was compiled indeed
    assert (tmp_path / "run/profile.json.gz").stat().st_size > 1000
    assert "aten::" in (tmp_path / "run/profile.txt").read_text()
    back_at_step_10(tmp_path / "run", tmp_path / "again")
    forks.run(1, *options(tmp_path, "again", dropout=0.0), "--compile")
    assert measured(tmp_path / "again") == compiled


def test_fresh_states_start_anew_once_and_the_same_command_goes_on(
    both: tuple[Path, Path], tmp_path: Path, forks: Forks
) -> None:
    back_at_step_10(both[0], tmp_path / "run")
    arguments = options(tmp_path, "run", dropout=0.0)
    path = tmp_path / "zero2.json"
    config = json.loads(path.read_text())
    config["optimizer"] = {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}}
    path.write_text(json.dumps(config))
    assert "was started with optimizer" in forks.run(1, *arguments, status=2)
    output = forks.run(1, *arguments, "--fresh_states")
    assert "with new optimizer states" in output
    before, rows = measured(both[0]), measured(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[10]["loss"] == pytest.approx(before[10]["loss"], rel=1e-6)  # its weights and data
    assert rows[11]["loss"] != pytest.approx(before[11]["loss"], rel=1e-6)  # another optimizer's
    again = options(tmp_path, "run", dropout=0.0, max_steps=STEPS + 1)
    path.write_text(json.dumps(config))
    output = forks.run(1, *again, "--fresh_states")
    assert "resuming from" in output
    assert "with new optimizer states" not in output
    assert len(measured(tmp_path / "run")) == STEPS + 1


def test_resuming_with_other_settings_is_refused(folder: Path, straight: str, forks: Forks) -> None:
    arguments = options(folder, "straight", dropout=0.2, seed=4321, vocab_size=500)
    path = folder / "zero2.json"
    config = json.loads(path.read_text())
    config["optimizer"]["params"]["lr"] = 0.5
    path.write_text(json.dumps(config))
    output = forks.run(1, *arguments, status=2)
    assert "alto_ds.pretrain: rank 0: the run in " in output
    assert "was started with seed=1234, now 4321; " in output
    assert "dropout=0.1, now 0.2; vocab_size=400, now 500; " in output
    assert "optimizer.params.lr=0.02, now 0.5; " in output
    assert "ranks=" not in output.split("was started with")[1]  # which may change
    assert "another --output_dir" in output


def test_a_model_of_a_free_size_trains_with_auto_and_another_size_is_refused(
    tmp_path: Path, forks: Forks
) -> None:
    size = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32, "n_inner": 48}
    (tmp_path / "config.json").write_text(json.dumps(size))
    arguments = options(tmp_path, "output", model=tmp_path / "config.json", n_layer=1, max_steps=2)
    arguments.append("--no-compile")
    path = tmp_path / "zero2.json"
    config = json.loads(path.read_text())
    config["optimizer"]["params"] |= {"alpha": "auto", "betas": "auto"}
    path.write_text(json.dumps(config))
    output = forks.run(1, *arguments)
    assert 'ALTO: "auto" stands for alpha=0.5, betas=(0.01, 0.9, 0.99)' in output
    assert "ALTO, group 0: lr=0.0, betas=[0.01, 0.9, 0.99], alpha=0.5" in output
    trained = json.loads((tmp_path / "output/model/config.json").read_text())
    assert {name: trained[name] for name in size} == size | {"n_layer": 1}
    output = forks.run(1, *arguments, "--n_layer", "2", status=2)
    assert "was started with model.n_layer=1, now 2. Use the same settings" in output


def test_text_that_is_missing_ends_all_ranks(folder: Path, forks: Forks) -> None:
    """Each by itself, with no launcher that would end them."""
    output = forks.run(2, *options(folder, "missing"), "no_such_file.txt", status=2)
    assert "--text names files that do not exist: no_such_file.txt" in output


def test_shell_scripts_parse() -> None:
    scripts = [*launcher.ROOT.glob("launch/*.sh"), *launcher.ROOT.glob(".ci/*")]
    assert len(scripts) >= 5
    for script in [*scripts, launcher.ROOT / "tests/two_hosts.sh"]:
        subprocess.run(["bash", "-n", script], check=True)
