"""Train examples/megatron_gpt.py in both of its ways, and its model in one process.

usage: train_megatron_gpt.py FOLDER, on any even number of CPU ranks, with examples/ on PYTHONPATH.
Text is prepared in FOLDER, and the losses of all steps are written to FOLDER/losses.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import megatron_gpt as example
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.utils.data import default_collate

import alto_ds
from tests.cuda_on_cpu import cuda_on_cpu

OPTIONS = (
    *("--steps", "10", "--global_batch", "16", "--micro_batch", "4", "--seq_length", "32"),
    *("--lr", "0.05"),
)


def reference() -> list[float]:
    """Losses of ALTO on whole tensors and whole global batches; each rank does all of it."""
    args = example.arguments(OPTIONS)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    data, vocab_size = example.sequences(example.prepared(), args)
    model = example.make_model(vocab_size, args)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": example.WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = alto_ds.ALTO(groups, lr=args.lr, **example.ALTO)
    losses = []
    for step in range(args.steps):
        first = step * args.global_batch
        rows = default_collate([data[first + number] for number in range(args.global_batch)])
        optimizer.zero_grad()
        loss = example.loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, example.CLIPPING)
        optimizer.step()
        losses.append(loss.item())
    parallel_state.destroy_model_parallel()
    return losses


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    os.chdir(sys.argv[1])
    found = {"reference": reference()}
    for name, more in (("megatron", ()), ("deepspeed", ("--deepspeed",))):
        found[name] = example.main([*OPTIONS, "--tensor_parallel", "2", *more])
    if dist.get_rank() == 0:
        Path("losses.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # in an orderly end PyTorch aborts now and then, in a thread of gloo


if __name__ == "__main__":
    with cuda_on_cpu():
        main()
