"""A script as others write it: DeepSpeed's own API and nothing of alto_ds.

It trains a small regression and prints the losses, the wrapped optimizer and its parameter groups.
"""

import argparse
import os
import sys

import deepspeed
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--greeting", default="")
parser = deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
engine, optimizer, _, _ = deepspeed.initialize(
    args=arguments, model=model, model_parameters=model.parameters()
)
rank = torch.distributed.get_rank()
inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(rank))
targets = inputs.sum(1, keepdim=True).sin()
losses = []
for _ in range(30):
    loss = (engine(inputs) - targets).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if rank == 0:
    inner = getattr(optimizer, "optimizer", optimizer)
    print(f"RESULT {arguments.greeting} {type(inner).__name__} {losses[0]:.4f} {losses[-1]:.4f}")
# Not in an orderly way: Python may exit while a thread of gloo still frees the last gathered
# tensors, and PyTorch aborts.
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
