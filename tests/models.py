"""Small models and text for tests in one process."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def tiny_gpt2(dtype: torch.dtype = torch.float64) -> Any:
    """A GPT-2 of two blocks over bytes, without dropout, the same at each call."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1234)
    config = GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def byte_batches(batch_size: int = 4, length: int = 32) -> Any:
    """Yield ``[batch_size, length]`` tokens, one after the other from a file of this Python."""
    path = Path(sysconfig.get_path("stdlib"), "argparse.py")
    tokens = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    while True:
        for batch in tokens.unfold(0, batch_size * length, batch_size * length):
            yield batch.view(batch_size, length)


def decay_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Matrices and embeddings with the settings' decay, biases and norms without."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim > 1]} | settings,
        {"params": [(n, p) for n, p in named if p.ndim <= 1]} | settings | {"weight_decay": 0.0},
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()
