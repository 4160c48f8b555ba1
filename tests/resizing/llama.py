"""A small model of transformers, which DeepSpeed's AutoTP can cut."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.module_inject.layers import GatherReplacedLayerParams, TensorParallel_Layer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.sharding.parallel_cases import whole

VOCABULARY = 64
STATES = ("exp_avg_grad", "exp_avg", "exp_avg_sq")


class Llama(nn.Module):
    """Tokens depend on the number of the sample alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1234)
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=4,
                tie_word_embeddings=False,
                attention_bias=True,
                mlp_bias=True,
            )
        )

    def groups(self) -> list[dict[str, Any]]:
        """Matrices; biases and norms; the head."""
        named = dict(self.named_parameters())
        head = named.pop("model.lm_head.weight")
        return [
            {"params": [p for p in named.values() if p.ndim > 1]},
            {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
            {"params": [head]},
        ]

    def forward(self, samples: range) -> Tensor:
        rows = [
            torch.randint(VOCABULARY, (8,), generator=torch.Generator().manual_seed(sample))
            for sample in samples
        ]
        tokens = torch.stack(rows)
        return self.model(tokens, labels=tokens).loss

    def held(self, engine: Any) -> dict[str, dict[str, Tensor]]:
        """Whole weights and states by their names; all ranks call this together."""
        states = {key: self._whole(engine, key) for key in STATES}
        return {"masters": self._whole(engine, None), **states}

    def _whole(self, engine: Any, key: str | None) -> dict[str, Tensor]:
        """As much of it as this tensor-parallel rank has, joined with the others' parts."""
        params = dict(self.named_parameters())
        parts = {name: whole(param, engine, key) for name, param in params.items()}
        found = {}
        for prefix, module in self.named_modules():
            own = dict(module.named_parameters(prefix, recurse=False))
            before = {name: param.data for name, param in own.items()}
            if isinstance(module, TensorParallel_Layer):
                for name, param in own.items():
                    param.data = parts[name]
                with GatherReplacedLayerParams(list(own.values()), module, enabled=True):
                    found.update({name: p.detach().clone() for name, p in own.items()})
                for name, param in own.items():
                    param.data = before[name]
            else:
                found.update({name: parts[name] for name in own})
        return found
