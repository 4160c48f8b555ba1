"""Pre-training of GPT-2 from a DeepSpeed JSON; ``examples/pretrain_gpt2.py`` is its command."""
