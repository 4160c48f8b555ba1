"""The main job's batches of streams, without a model.

usage: stream_ranks.py OUT DATASET,DATASET,... ARGUMENTS..., where ARGUMENTS are the main job's

For each dataset each rank notes its micro batches of two global batches from each of FIRST on, and
which documents it has tokenized for the first; where the dataset is called "broken", also what is
raised once its last file is. All that is in OUT/RANK-of-RANKS.pt.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from alto_ds.pretrain.command import parse_arguments
from alto_ds.pretrain.data import streamed
from alto_ds.pretrain.data.sequences import make_sequences
from alto_ds.pretrain.ranks import init_distributed

FIRST = (0, 1, 7, 100)
BATCH_SIZE, GAS = 12, 2
read: list[str] = []
joined = streamed.joined


def noted(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    read.extend(texts)
    return joined(texts, tokenizer)


def take(data: Any, first: int, rank: int, world_size: int) -> torch.Tensor:
    """``[global batches, gas, micro batch, seq_length]``."""
    batches = data.training_batches(first, BATCH_SIZE, GAS, rank, world_size)
    return torch.stack(list(islice(batches, 2 * GAS))).unflatten(0, (2, GAS))


def main(out: Path, datasets: Sequence[str], arguments: Sequence[str]) -> None:
    settings = parse_arguments(arguments)
    init_distributed(timedelta(seconds=60))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found: dict[str, Any] = {}
    for dataset in datasets:
        source = replace(settings.data, dataset=dataset, streaming=True)
        data = make_sequences(replace(settings, data=source), resumed=False)
        read.clear()
        streamed.joined = noted
        batches = {FIRST[0]: take(data, FIRST[0], rank, world_size)}
        streamed.joined = joined
        batches |= {first: take(data, first, rank, world_size) for first in FIRST[1:]}
        found[dataset] = {"batches": batches, "read": list(read)}
        if Path(dataset).name == "broken":
            torch.distributed.barrier()
            if rank == 0:
                max(Path(dataset).iterdir()).write_text('{"text": "cut')
            torch.distributed.barrier()
            try:
                take(data, FIRST[0], rank, world_size)
            except RuntimeError as error:
                found[dataset]["error"] = str(error)
    torch.save(found, out / f"{rank}-of-{world_size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
