"""The recipes for Megatron: examples/megatron_gpt.py, and Megatron-LM's own pretrain_gpt.py.

The latter takes a clone and two packages that it asks for:

.. code-block:: bash

    git clone https://github.com/NVIDIA/Megatron-LM --branch core_v0.16.1
    pip install pybind11 six
    MEGATRON_LM=$PWD/Megatron-LM pytest -m slow tests/test_megatron_recipes.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from alto_ds.megatron.megatron_lm import take_settings, use_alto
from tests import launcher

CLONE = os.environ.get("MEGATRON_LM", "")
ALTO = (
    *("--megatron", "--use-distributed-optimizer"),
    *("--alto-alpha", "-5", "--alto-betas", "0.9", "0.9", "0.99"),
)


def test_the_example_trains_as_one_process_by_megatron_core_and_by_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP 2 × DP 2, two micro batches: DistributedOptimizer, and ZeRO-1 with the JSON's ALTO."""
    pytest.importorskip("datasets")
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONPATH", str(launcher.ROOT / "examples"))
    status, printed = launcher.run_cases(
        4, "tests.scripts.train_megatron_gpt", str(tmp_path), seconds=300
    )
    assert status == 0, printed
    found = json.loads((tmp_path / "losses.json").read_text())
    assert len(found["reference"]) == 10
    assert found["reference"][-1] < found["reference"][0] - 0.5
    for name in ("megatron", "deepspeed"):
        assert found[name] == pytest.approx(found["reference"], rel=1e-5)


# Megatron-LM


def test_settings_are_taken_from_the_command_line_and_the_rest_keeps_its_order() -> None:
    line = "run.py --lr 1e-3 --alto-betas 0.99 0.9 0.99 --bf16 --alto-alpha=-5e0 --alto_eps 1e-6"
    settings, rest = take_settings([*line.split(), "--alto-state-dtype", "bf16", "--seed", "-1"])
    assert settings == {
        "betas": [0.99, 0.9, 0.99],
        "alpha": -5.0,
        "eps": 1e-6,
        "state_dtype": "bf16",
    }
    assert rest == ["run.py", "--lr", "1e-3", "--bf16", "--seed", "-1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--alto-alhpa -5", "alhpa=-5 is no setting of ALTO; did you mean 'alpha'?"),
        ("--alto-beta 0.9", "beta=0.9 is no setting of ALTO"),
        ("--alto-type E --alto-betas 0.9", "betas=0.9 is no setting of E"),
        ("--alto-type LAMB", 'type=\'LAMB\' must be "ALTO" or "E"'),
        ("--alto-lr 0.1", "--alto-lr is Megatron-LM's to set; write --lr"),
        ("--alto-alpha", "--alto-alpha has no value; write --alto-alpha VALUE"),
        ("--alto-alpha -5 --alto-alpha 0", "--alto-alpha is given twice"),
        ("--alto-alpha -500", "alpha=-500 is out of bounds"),
        ("--alto-type E --alto-alpha -500", "alpha=-500 is out of bounds"),
        ("--alto-betas 0.9 0.9", "betas=[0.9, 0.9] must be three numbers"),
    ],
)
def test_wrong_settings_are_refused_before_megatron_starts(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        use_alto(["pretrain_gpt.py", *line.split()])


def test_a_script_without_megatron_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.training", None)  # megatron-core 0.19 installs one
    with pytest.raises(ValueError, match=r"--megatron: there is no megatron\.training"):
        use_alto(["pretrain_gpt.py"])


def test_wrong_settings_end_the_command_with_one_line() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "alto_ds.run", "--megatron", "examples/byte_gpt2.py", "--alto-x=1"],
        cwd=launcher.ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("alto_ds.run: alto_ds.megatron: x=1 is no setting of ALTO; use ")


ITERATIONS = 10
LR, WEIGHT_DECAY = 0.05, 0.1
ARGUMENTS = {
    "num-layers": 2,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "micro-batch-size": 2,
    "global-batch-size": 8,
    "train-iters": ITERATIONS,
    "lr": LR,
    "min-lr": LR / 10,
    "lr-decay-style": "linear",
    "lr-warmup-iters": 2,
    "start-weight-decay": WEIGHT_DECAY / 2,
    "end-weight-decay": WEIGHT_DECAY,
    "weight-decay-incr-style": "linear",
    "clip-grad": 1.0,
    "attention-dropout": 0,
    "hidden-dropout": 0,
    "split": "90,5,5",
    "num-workers": 0,
    "log-interval": 1,
    "eval-iters": 1,
    "eval-interval": 1000,
    "save-interval": ITERATIONS // 2,
    "tokenizer-type": "HuggingFaceTokenizer",
    # What a CPU has, and packages that are not needed here.
    "transformer-impl": "local",
    "distributed-backend": "gloo",
}
SWITCHES = (
    *("use-cpu-initialization", "no-persist-layer-norm"),
    *("no-masked-softmax-fusion", "no-gradient-accumulation-fusion"),
    *("no-bias-gelu-fusion", "no-bias-dropout-fusion"),
)


def needs_clone(test: Any) -> Any:
    """Mark a test as slow, to be skipped where there is no clone of Megatron-LM."""
    there = pytest.mark.skipif(not CLONE, reason="MEGATRON_LM names no clone; see this file's top")
    return pytest.mark.slow(there(test))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of some of Python's own modules, prepared in one shard."""
    folder = tmp_path_factory.mktemp("text")
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
    options = {"output_prefix": folder / "python", "vocab_size": 500, "shards": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(
        [sys.executable, "-m", "alto_ds.pretrain.prepare", *words, "--text", *map(str, paths)],
        env=os.environ | launcher.settings(folder),
        check=True,
    )
    return str(folder / "python")


def pretrain_gpt(ranks: int, text: str, *more: str, fails: bool = False, **options: Any) -> str:
    """What Megatron-LM's script printed, with ALTO where ``more`` begins with --megatron."""
    given = ARGUMENTS | {
        "data-path": f"{text}-00000-of-00001",
        "data-cache-path": f"{text}-cache",
        "tokenizer-model": f"{text}-tokenizer",
    }
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    # Its makefile asks python3-config where this Python's headers are.
    path = [sysconfig.get_path("scripts"), f"{sys.base_prefix}/bin", os.environ["PATH"]]
    finished = subprocess.run(
        [
            *launcher.torchrun(ranks),
            "tests/scripts/run_megatron_lm.py",
            *more[:1],
            f"{CLONE}/pretrain_gpt.py",
            *more[1:],
            *(word for name, value in given.items() for word in (f"--{name}", str(value))),
            *(f"--{name}" for name in SWITCHES),
        ],
        env=os.environ
        | launcher.settings(Path(text).parent)
        | {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join([str(launcher.ROOT), os.environ.get("PYTHONPATH", "")]),
            "TORCHDYNAMO_DISABLE": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        },
        cwd=launcher.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (finished.returncode != 0) is fails, finished.stdout[-8000:]
    return finished.stdout


def losses(printed: str) -> list[float]:
    """Of all iterations, as Megatron-LM prints them, with seven digits."""
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", printed)]


def trained(printed: str) -> dict[str, Any]:
    """What the script of this test printed of the ALTO that has trained."""
    (line,) = re.findall(r"^ALTO (.*)$", printed, re.MULTILINE)
    return json.loads(line)


@needs_clone
def test_pretrain_gpt_trains_with_alto_on_ranks_as_in_one_process(
    tmp_path: Path, text: str
) -> None:
    whole = pretrain_gpt(1, text, *ALTO)
    assert len(losses(whole)) == ITERATIONS
    assert losses(whole)[-1] < losses(whole)[0] - 0.1
    assert whole.count("get_megatron_optimizer is replaced, and ALTO(alpha=-5, betas=[0.9") == 1
    # Adam's own run is another.
    assert losses(pretrain_gpt(1, text))[-1] != pytest.approx(losses(whole)[-1], rel=1e-3)
    for ranks, of_a_layer in ((2, 1), (2, 2), (4, 2)):
        printed = pretrain_gpt(ranks, text, *ALTO, tensor_model_parallel_size=of_a_layer)
        assert losses(printed) == pytest.approx(losses(whole), rel=1e-5)
        # Megatron-LM's schedules have gone to their ends, in the groups that ALTO steps with.
        (decayed, others), layers = trained(printed)["groups"], trained(printed)["layers"]
        assert decayed == pytest.approx([LR / 10, WEIGHT_DECAY])
        assert others == pytest.approx([LR / 10, 0])
        assert layers == 28


@needs_clone
def test_pretrain_gpt_resumes_with_all_states(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "checkpoints"
    straight = losses(pretrain_gpt(2, text, *ALTO, save=folder))[ITERATIONS // 2 :]
    # Megatron-LM prints for the second iteration of a start the mean of the first two.
    straight[1] = (straight[0] + straight[1]) / 2
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATIONS // 2))
    for ranks in (2, 1):
        resumed = losses(pretrain_gpt(ranks, text, *ALTO, load=folder))
        assert resumed == pytest.approx(straight, rel=1e-6)


@needs_clone
@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (["--alto-alhpa", "-5"], {}, "alto_ds.run: alto_ds.megatron: alhpa=-5 is no setting of"),
        ([], {"optimizer": "muon"}, "--megatron: --optimizer muon leaves no place for ALTO"),
    ],
)
def test_pretrain_gpt_refuses_what_would_not_train_with_alto(
    text: str, more: list[str], options: dict[str, Any], message: str
) -> None:
    printed = pretrain_gpt(1, text, "--megatron", *more, fails=True, **options)
    assert message in printed
    assert not losses(printed)
