"""Which model is trained, and how is it saved?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from alto_ds.pretrain.settings import SIZES, ModelSettings


def model_config(settings: ModelSettings, tokenizer: Any) -> GPT2Config:
    """The configuration of the model that the settings name, for a tokenizer."""
    dropout = settings.dropout
    return GPT2Config(
        **SIZES[settings.model],
        # Rows in multiples of 64 make faster matrix products on GPUs; no token uses the rest.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )


def make_model(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """A model with random weights, the same for a seed on every rank and for every ZeRO stage.

    Not under ``deepspeed.zero.Init``: there transformers initialises weights that have been
    partitioned away, and GPT-2 starts from PyTorch's defaults, at a loss of 90 in place of 8.
    So each rank holds the whole model once, on the CPU, which GPT-2's sizes allow.
    """
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices and embeddings as the JSON says; biases and LayerNorms without weight decay.

    Beside decayed layers ALTO scales none that are not decayed: the authors' rule. Where the JSON
    says ``"weight_decay": 0`` no layer is decayed, and ALTO then scales all, with a warning.
    """
    decayed: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters():
        (others if name.endswith(".bias") or ".ln_" in name else decayed)[name] = param
    # DeepSpeed takes no named parameters; ALTO says these names in its messages.
    return [
        {"params": list(decayed.values()), "param_names": list(decayed)},
        {"params": list(others.values()), "param_names": list(others), "weight_decay": 0.0},
    ]


def save_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights and tokenizer for ``GPT2LMHeadModel.from_pretrained``.

    Every rank must call this together: under ZeRO-3 the weights are gathered one by one.
    """
    state = {}
    writes = torch.distributed.get_rank() == 0
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            if writes:
                state[name] = param.detach().cpu().clone()
    if writes:
        engine.module.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
