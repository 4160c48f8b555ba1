"""Megatron-DeepSpeed's pretrain_gpt.py, unchanged, with ALTO in its DeepSpeed config.

It takes a clone and two packages that it asks for:

.. code-block:: bash

    git clone https://github.com/deepspeedai/Megatron-DeepSpeed && pip install pybind11 six
    MEGATRON_DEEPSPEED=$PWD/Megatron-DeepSpeed pytest -m slow tests/test_megatron_deepspeed.py
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alto_ds.pretrain.data.indexed import IndexedWriter
from tests import launcher
from tests.models import relative_error

CLONE = os.environ.get("MEGATRON_DEEPSPEED", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLONE, reason="MEGATRON_DEEPSPEED names no clone; see this file's top"),
]
ITERATIONS, LR = 10, 0.01
ARGUMENTS = {
    "num-layers": 2,
    "hidden-size": 32,
    "num-attention-heads": 2,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "micro-batch-size": 1,
    "global-batch-size": 4,
    "train-iters": ITERATIONS,
    "lr": LR,
    "min-lr": LR / 10,
    "lr-decay-style": "linear",
    "lr-decay-iters": ITERATIONS,
    "lr-warmup-iters": 2,
    "start-weight-decay": 0.05,
    "end-weight-decay": 0.1,
    "weight-decay-incr-style": "linear",
    "clip-grad": 1.0,
    "attention-dropout": 0,
    "hidden-dropout": 0,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 256,
    "split": "98,1,1",
    "log-interval": 1,
    "eval-iters": 0,
    "eval-interval": 1000,
    "distributed-backend": "gloo",
}
SWITCHES = ("deepspeed", "no-pipeline-parallel", "no-gradient-accumulation-fusion")
ALTO = {"type": "ALTO", "params": {"lr": 7.0, "alpha": -5, "betas": [0.99, 0.9, 0.99]}}
ADAM = {"type": "Adam", "params": {}}  # not looked at, for Megatron passes an optimizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of Python's own modules as bytes, in Megatron's format."""
    prefix = tmp_path_factory.mktemp("text") / "python"
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
    with IndexedWriter(prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), np.uint16) as file:
        for path in paths:
            file.add(list(path.read_bytes()))
    return str(prefix)


def run(
    folder: Path, text: str, ranks: int, stage: int, optimizer: dict[str, Any], mode: str
) -> tuple[dict[str, Any], str]:
    """What the engine has trained, and what was printed."""
    config = {
        "train_batch_size": ARGUMENTS["global-batch-size"],
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "optimizer": optimizer,
    }
    path, report = folder / "config.json", folder / "report.pt"
    path.write_text(json.dumps(config))
    options = ARGUMENTS | {
        "data-path": text,
        "data-cache-path": folder,
        "deepspeed_config": path,
        "zero-stage": stage,
    }
    output = launcher.run(
        ranks,
        *(["--module", "alto_ds.run"] if mode == "unchanged" else []),
        "tests/scripts/run_megatron_deepspeed.py",
        *(CLONE, str(report), mode),
        *(f"--{name}={value}" for name, value in options.items()),
        *(f"--{name}" for name in SWITCHES),
        folder=folder,
    )
    assert report.exists(), output[-6000:]
    return torch.load(report), output


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """That weights and settings are those of ALTO on whole tensors in one process."""
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        # The gradients of ranks are added in another order.
        assert relative_error(found["weights"][name], weight) < 1e-5, name
    assert found["written"] == expected["written"]
    assert found["trust_ratios"].keys() == expected["trust_ratios"].keys()


def test_pretrain_gpt_trains_with_the_configs_alto_as_on_whole_tensors(
    tmp_path: Path, text: str
) -> None:
    found, output = run(tmp_path, text, 2, 1, ALTO, "unchanged")
    assert found["optimizer"] == "ALTO"
    assert output.count("ALTO, which the config names, replaces Adam") == 1
    # Megatron's schedule: two iterations of warm-up from 0, and a weight decay that grows.
    assert len(found["written"]) == ITERATIONS
    first, second, third = ({n: (lr, wd) for n, lr, wd in w} for w in found["written"][:3])
    assert first["wd_no_scale_lr"] == pytest.approx((0, 0.05))
    assert second["wd_no_scale_lr"] == pytest.approx((LR / 2, 0.055))
    assert third["wd_no_scale_lr"] == pytest.approx((LR, 0.06))
    assert third["no_wd_no_scale_lr"] == pytest.approx((LR, 0))
    scaled = [name for name, (_, is_scaled) in found["trust_ratios"].items() if is_scaled]
    assert scaled == [name for name in found["trust_ratios"] if found["weights"][name].ndim > 1]
    assert found["trust_ratios"].keys() == found["weights"].keys()

    expected, expected_output = run(tmp_path, text, 1, 0, ADAM, "passes-alto")
    check_equal(found, expected)
    assert len(losses(output)) == ITERATIONS
    assert losses(output) == pytest.approx(losses(expected_output), rel=1e-5)


def test_under_zero_init_all_layers_are_scaled_and_megatrons_rule_is_named(
    tmp_path: Path, text: str
) -> None:
    found, output = run(tmp_path, text, 2, 3, ALTO, "unchanged")
    assert found["optimizer"] == "ALTO"
    assert output.count("a rule such as len(param.shape) == 1 takes matrices for biases") == 1
    assert [name for name, _, _ in found["written"][0]] == ["no_wd_no_scale_lr"]
    assert all(is_scaled for _, is_scaled in found["trust_ratios"].values())

    expected, _ = run(tmp_path, text, 1, 0, ADAM, "passes-alto-undecayed")
    check_equal(found | {"written": []}, expected | {"written": []})
