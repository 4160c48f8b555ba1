"""What makes the main job fast or small changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("deepspeed")

from transformers import GPT2Config

from alto_ds.pretrain import model as models
from alto_ds.pretrain.model import IGNORED, flops_per_token, make_model, next_token_loss
from alto_ds.pretrain.settings import ModelSettings
from alto_ds.pretrain.setup import compiles
from alto_ds.pretrain.speed import WARM_UP, speed_metrics

CONFIG = GPT2Config(
    **{"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 12, "vocab_size": 64},
    **{"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "sdpa"},
)


@pytest.fixture
def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, CONFIG.vocab_size, (4, 12))


def gradients(model: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(2)  # of dropout
    loss = model(tokens, tokens)
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_loss_is_that_of_transformers(tokens: Tensor) -> None:
    import transformers

    model = make_model(CONFIG, 1).eval()
    other = transformers.GPT2LMHeadModel(CONFIG).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens, tokens), other(tokens, labels=tokens).loss)


@pytest.mark.parametrize("most", [64, 500, 64 * 47])
def test_the_loss_in_parts_is_the_loss_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, tokens: Tensor, most: int
) -> None:
    """One token a part; parts of unequal lengths; two."""
    model = make_model(CONFIG, 1)
    loss, expected = gradients(model, tokens)
    sizes = []
    monkeypatch.setattr(models, "LOGITS", most)
    handle = model.lm_head.register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    in_parts, found = gradients(model, tokens)
    handle.remove()
    assert max(sizes) <= most
    assert len(sizes) >= 2 * -(-tokens.numel() * 64 // most)  # forward and again for the gradient
    torch.testing.assert_close(in_parts, loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_labels_that_are_ignored_do_not_count(tokens: Tensor) -> None:
    head = torch.nn.Linear(16, 64, bias=False)
    hidden = torch.randn(4, 12, 16)
    labels = tokens.clone()
    labels[1:] = IGNORED
    losses = functional.cross_entropy(head(hidden[0, :-1]), tokens[0, 1:])
    torch.testing.assert_close(next_token_loss(head, hidden, labels), losses)
    assert next_token_loss(head, hidden, torch.full_like(labels, IGNORED)) == 0


def test_activation_checkpointing_keeps_less_and_changes_no_gradient(tokens: Tensor) -> None:
    def kept_and_gradients(checkpointing: bool) -> tuple[int, list[Tensor]]:
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(make_model(CONFIG, 1, checkpointing), tokens)[1]
        return sum(kept), found

    (whole, expected), (less, found) = kept_and_gradients(False), kept_and_gradients(True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert less < whole / 2


def test_attention_is_pytorchs_fused_one(monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    calls = []
    fused = functional.scaled_dot_product_attention

    def recorded(*arguments: Any, **named: Any) -> Tensor:
        calls.append(named)
        return fused(*arguments, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    make_model(CONFIG, 1)(tokens, tokens)
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)] * 2


def test_a_steps_speed_is_given_after_the_warm_up() -> None:
    assert speed_metrics(1000, 3e12, 2.0, WARM_UP) == {"tokens_per_second": 500.0}
    found = speed_metrics(1000, 3e12, 2.0, WARM_UP + 1)
    assert (found["tokens_per_second"], found["tflops"]) == (500.0, 1.5)


def test_operations_of_a_token_are_those_of_matrix_products_and_attention() -> None:
    model = make_model(CONFIG, 1)
    matrices = 64 * 16 + 2 * 12 * 16 * 16
    others = 2 * (4 * 16 + 9 * 16) + 2 * 16  # LayerNorms and biases, which are counted, too
    assert flops_per_token(model, 12) == 6 * (matrices + others) + 12 * 2 * 16 * 12


@pytest.mark.parametrize(
    ("model", "stage", "wish", "compiled"),
    [
        ("gpt2", 1, None, True),
        ("gpt2", 3, None, False),
        ("gpt2-tiny", 1, None, False),
        ("gpt2-tiny", 3, True, True),
        ("gpt2", 1, False, False),
    ],
)
def test_a_model_is_compiled_where_that_pays_or_as_wished(
    model: str, stage: int, wish: bool | None, compiled: bool
) -> None:
    assert compiles(ModelSettings(model=model, compile=wish), stage) is compiled
