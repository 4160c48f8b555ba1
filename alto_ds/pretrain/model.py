"""Which model is trained, and how is it saved?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config

from alto_ds.pretrain.settings import ModelSettings

IGNORED = -100  # a label that is not predicted
# Logits in memory at once: 512 MiB in float32. More are computed part by part, and again for the
# gradient, which costs a third of the last layer's time.
LOGITS = 2**27


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """The one of transformers, with a loss in place of the logits of the whole batch."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss per predicted token.

        Args:
            input_ids: ``[sequences, length]`` tokens, int64.
            labels: the same, but :data:`IGNORED` where a token is not to be predicted.

        Returns:
            A scalar in float32, in nats; 0 where no token is predicted.
        """
        hidden = self.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
        return next_token_loss(self.lm_head, hidden, labels)


def next_token_loss(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """See :meth:`GPT2LMHeadModel.forward`.

    Args:
        head: the last layer, from hidden states to logits.
        hidden: ``[sequences, length, hidden size]``.
        labels: ``[sequences, length]``.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    hidden = hidden.flatten(0, 1)
    parts = -(-len(hidden) * head.out_features // LOGITS)
    if parts == 1:
        total = _sum_of_losses(head, hidden, targets)
    else:
        total = hidden.new_zeros((), dtype=torch.float32)
        for part, target in zip(hidden.chunk(parts), targets.chunk(parts), strict=True):
            total = total + checkpoint(_sum_of_losses, head, part, target, use_reentrant=False)
    return total / (targets != IGNORED).sum().clamp(min=1)


def _sum_of_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden).float()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def model_config(settings: ModelSettings, tokenizer: Any) -> GPT2Config:
    """The configuration of the model that the settings name, for a tokenizer."""
    dropout = settings.dropout
    return GPT2Config(
        **settings.architecture,
        # Rows in multiples of 64 make faster matrix products on GPUs; no token uses the rest.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
        attn_implementation="sdpa",
    )


def make_model(
    config: GPT2Config, seed: int, activation_checkpointing: bool = False
) -> GPT2LMHeadModel:
    """A model with random weights, the same for a seed on every rank and for every ZeRO stage.

    Args:
        config: of the model.
        seed: of the weights.
        activation_checkpointing: keep a block's input only and compute the block again for its
            gradient, which takes less memory and a third more time.

    Not under ``deepspeed.zero.Init``: there transformers initialises weights that have been
    partitioned away, and GPT-2 starts from PyTorch's defaults, at a loss of 90 in place of 8.
    So each rank holds the whole model once, on the CPU, which GPT-2's sizes allow.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def flops_per_token(model: nn.Module, length: int) -> int:
    """Floating-point operations of forward and backward pass for one token.

    6 for each parameter of a matrix product, and 12 · layers · hidden size · length for attention
    (Chowdhery et al., PaLM, 2022, appendix B). What is computed twice to save memory counts once.
    """
    config: Any = model.config
    positions = config.n_positions * config.n_embd  # which are looked up
    # Under ZeRO-3 numel() is that of a placeholder.
    params = sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters())
    return 6 * (params - positions) + 12 * config.n_layer * config.n_embd * length


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
