"""Pre-training of GPT-2 from a DeepSpeed JSON: ``python -m alto_ds.pretrain`` on every rank."""
