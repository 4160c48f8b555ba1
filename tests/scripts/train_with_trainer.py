"""Hugging Face Trainer with ALTO, by the two routes that the README shows.

usage: train_with_trainer.py ROUTE CONFIG OUTPUT_DIR, where ROUTE is "json" or "class"
"""

import json
import sys

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import alto_ds

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
route, config, output_dir = [word for word in sys.argv[1:] if not word.startswith("--")]

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
)
pattern = torch.arange(32) * 7 % 64
examples = [{"input_ids": (pattern + i) % 64, "labels": (pattern + i) % 64} for i in range(256)]
arguments = TrainingArguments(
    output_dir=output_dir,
    deepspeed=config,
    per_device_train_batch_size=8,
    max_steps=20,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    seed=0,
)
settings = {"lr": 1e-2, "betas": (0.9, 0.9, 0.99), "alpha": -5.0, "weight_decay": 1e-4}
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=examples,
    optimizer_cls_and_kwargs=(alto_ds.ALTO, settings) if route == "class" else None,
)
trainer.train()
alto = trainer.deepspeed.optimizer.optimizer
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
if torch.distributed.get_rank() == 0:
    result = {
        "optimizer": type(alto).__name__,
        "groups": len(alto.param_groups),
        "layers": len(alto.trust_ratios(model.named_parameters())),
        "parameters": len(list(model.parameters())),
        "ranks": torch.distributed.get_world_size(),
        "losses": losses,
    }
    print("RESULT " + json.dumps(result))
torch.distributed.destroy_process_group()
