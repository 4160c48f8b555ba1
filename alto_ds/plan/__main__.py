"""Plan a pre-training run: memory, communication and time, without processes.

.. code-block:: bash

    python -m alto_ds.plan configs/gpt2-xl/zero1_batch4096.json --model gpt2-xl --nodes 16
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import alto_ds  # noqa: F401  registers the optimizer types
from alto_ds.plan.choice import plan, recommended
from alto_ds.plan.duration import GPUS, Speeds
from alto_ds.plan.job import read_job
from alto_ds.plan.report import as_dict, as_text
from alto_ds.pretrain.deepspeed_json import check_values, read_deepspeed_json
from alto_ds.pretrain.options import OneLineParser, add_size
from alto_ds.pretrain.settings import ModelSettings

NAME = "alto_ds.plan"


def main() -> None:
    """Print the plan that the command line asks for."""
    parser = OneLineParser(prog=NAME, description="Plan memory, communication and time of a run.")
    parser.add_argument("config", type=Path, help="DeepSpeed's JSON")
    parser.add_argument("--model", required=True, help="gpt2-xl and so on, or a config.json")
    add_size(parser)
    parser.add_argument("--seq_length", type=int, help="tokens (default: all that it takes)")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--vocab_size", type=int, default=50257, help="tokens (%(default)s)")
    parser.add_argument("--nodes", type=_count, default=1, help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=_count, default=8, help="default: %(default)s")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="default: %(default)s")
    parser.add_argument("--steps", type=_count, help="default: those of the scheduler")
    parser.add_argument(
        "--mfu", type=_share, default=0.4, help="model FLOP/s by the GPU's (%(default)s)"
    )
    parser.add_argument(
        "--network", type=_speed, default=50.0, help="GB/s of a GPU to other nodes (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    given = parser.parse_args()
    try:
        config = read_deepspeed_json(given.config)
        if "optimizer" not in config:
            raise ValueError('it has no "optimizer"; add one, as in configs/')
        check_values(config)
        model = ModelSettings(
            model=given.model,
            n_layer=given.n_layer,
            n_embd=given.n_embd,
            n_head=given.n_head,
            seq_length=given.seq_length,
            activation_checkpointing=given.activation_checkpointing,
        )
        job = read_job(
            config,
            model,
            nodes=given.nodes,
            gpus_per_node=given.gpus_per_node,
            vocab_size=given.vocab_size,
            steps=given.steps,
        )
    except (ValueError, OSError) as error:
        parser.error(f"{given.config}: {error}")
    speeds = Speeds(gpu=GPUS[given.gpu], mfu=given.mfu, network=given.network * 1e9)
    figures = as_dict(plan(job, speeds), speeds, recommended(job, speeds))
    print(json.dumps(figures, indent=1) if given.json else as_text(figures))


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} must be a whole number of at least 1")
    return int(word)


def _share(word: str) -> float:
    if not 0 < _number(word) <= 1:
        raise argparse.ArgumentTypeError(f"{word} must be in (0, 1], such as 0.4")
    return float(word)


def _speed(word: str) -> float:
    if not 0 < _number(word) < math.inf:
        raise argparse.ArgumentTypeError(f"{word} must be above 0, such as 50")
    return float(word)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:  # which argparse would tell by the name of a function
        return math.nan


if __name__ == "__main__":
    main()
