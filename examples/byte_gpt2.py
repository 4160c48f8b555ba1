"""A tiny GPT-2 over bytes, and text for it, for the other examples."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel


def model() -> GPT2LMHeadModel:
    """GPT-2 of two blocks without dropout, 36,000 parameters, the same at each call."""
    torch.manual_seed(1234)
    config = GPT2Config(
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # The fused attention of PyTorch has no second derivative.
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def batches(batch_size: int) -> Iterator[Tensor]:
    """Yield ``[batch_size, 64]`` bytes from random places of a file of this Python, for ever."""
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1234)
    while True:
        starts = torch.randint(len(tokens) - 64, (batch_size, 1), generator=generator)
        yield tokens[starts + torch.arange(64)]
