"""Hugging Face Trainer with ALTO, by the two routes that the README shows, and without decay.

usage: train_with_trainer.py JSON CLASS AUTO OUTPUT_DIR, three DeepSpeed configurations: with ALTO,
without an optimizer, and with ALTO's "betas": "auto" and no alpha
"""

import json
import sys
import warnings
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import alto_ds

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
with_alto, without_optimizer, with_auto, output_dir = [
    word for word in sys.argv[1:] if not word.startswith("--")
]
LR, STEPS = 0.1, 60  # from weights as small as GPT-2's first ones, ratios let layers grow slowly
pattern = torch.arange(32) * 7 % 64
examples = [{"input_ids": (pattern + i) % 64, "labels": (pattern + i) % 64} for i in range(256)]
settings = {"lr": LR, "betas": (0.9, 0.9, 0.99), "alpha": -5.0}


def train(config: str, weight_decay: float, steps: int, **more: Any) -> dict[str, Any]:
    """What a run leaves."""
    AcceleratorState._reset_state(reset_partial_state=False)  # of the run before
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
    )
    arguments = TrainingArguments(
        output_dir=output_dir,
        deepspeed=config,
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=LR,
        weight_decay=weight_decay,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, **more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    alto = trainer.deepspeed.optimizer.optimizer
    ratios = alto.trust_ratios(model.named_parameters())
    return {
        "optimizer": type(alto).__name__,
        "alpha, betas": [alto.param_groups[0][name] for name in ("alpha", "betas")],
        "groups": len(alto.param_groups),
        "layers": sorted(ratios),
        "scaled": sorted(name for name, row in ratios.items() if row.scaled),
        "parameters": sorted(name for name, _ in model.named_parameters()),
        "ranks": torch.distributed.get_world_size(),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "warnings": [str(w.message) for w in caught if "no parameter group" in str(w.message)],
    }


runs = {
    "json": train(with_alto, 1e-4, STEPS),
    "class": train(
        without_optimizer, 1e-4, STEPS, optimizer_cls_and_kwargs=(alto_ds.ALTO, settings)
    ),
    "json with auto, Trainer's own weight_decay": train(with_auto, 0.0, 2),
}
if torch.distributed.get_rank() == 0:
    print("RESULT " + json.dumps(runs))
torch.distributed.destroy_process_group()
