"""Hugging Face's Trainer as its example run_clm uses it: GPT-2 from new weights, AdamW, compiled.

    python -m tests.benchmarks.hf_trainer MODEL VOCABULARY LENGTH MICRO ACCUMULATION

Its text is random tokens. ``throughput`` starts it on each rank; a line is printed for each step.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from alto_ds.pretrain.settings import SIZES


class RandomTokens(Dataset[dict[str, Tensor]]):
    """Sequences of random tokens, the same for an index."""

    def __init__(self, vocabulary: int, length: int) -> None:
        generator = torch.Generator().manual_seed(1234)
        self._tokens = torch.randint(vocabulary, (4096, length), generator=generator)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


def main() -> None:
    model, numbers = sys.argv[1], map(int, sys.argv[2:])
    vocabulary, length, micro, accumulation = numbers
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**SIZES[model], vocab_size=vocabulary, use_cache=False, **dropout)
    arguments = TrainingArguments(
        output_dir="trainer",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=10**6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # so that it prints each step
        use_cpu=True,
        ddp_backend="gloo",
        torch_compile=True,
    )
    Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=RandomTokens(vocabulary, length),
        data_collator=default_data_collator,
    ).train()


if __name__ == "__main__":
    main()
