"""Classify images with ALTO under DeepSpeed's ZeRO.

    deepspeed --num_accelerators 2 examples/vision.py \
        --deepspeed_config configs/gpt2-tiny/zero2.json --dataset digits

On CPUs set DS_ACCELERATOR=cpu. Optimizer, batch size and ZeRO's stage are those of the JSON. The
folder of MNIST, CIFAR-10 or CIFAR-100 does as well as digits. The losses of an MLP are the same on
any number of ranks; a ResNet normalizes over the micro batch of a rank. Needs alto-ds[compare].
"""

from __future__ import annotations

import argparse
import itertools

import deepspeed
import torch
import torch.distributed as dist

import alto_ds  # noqa: F401  # so that DeepSpeed knows the type ALTO
from alto_ds.compare.spec import MLP, RESNETS, VisionSettings
from alto_ds.compare.vision import VisionTask


def arguments() -> tuple[argparse.Namespace, VisionTask]:
    """Read the command line, and the images that it names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--dataset", default="digits", help="digits, or a folder")
    parser.add_argument("--model", default=MLP, help=", ".join((MLP, *RESNETS)))
    parser.add_argument("--augment", action="store_true", help="crop and flip at random")
    parser.add_argument("--label_noise", type=float, default=0.0, help="fraction of wrong labels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", help="set by the launcher")
    parser = deepspeed.add_config_arguments(parser)
    options = parser.parse_args()
    names = ("dataset", "model", "augment", "label_noise")
    chosen = {name: getattr(options, name) for name in names}
    try:
        task = VisionTask(VisionSettings(type="vision", **chosen))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options, task


def main() -> None:
    """Train, and print the mean loss of each 50th step and the accuracy on the test images."""
    options, task = arguments()
    deepspeed.init_distributed()
    model = task.model(options.seed)
    hidden, outer, undecayed = task.parameters(model)
    groups = [{"params": hidden + outer}, {"params": undecayed, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=options.deepspeed_config
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro_batch = engine.train_micro_batch_size_per_gpu()
    batches = task.batches(options.seed, engine.train_batch_size(), micro_batch)
    of_rank = itertools.islice(batches, rank, None, world_size)
    for step in range(1, options.steps + 1):
        losses = []
        for _ in range(engine.gradient_accumulation_steps()):
            loss = task.loss(engine, next(of_rank))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean() / world_size
        dist.all_reduce(mean)
        if rank == 0 and (step == 1 or step % 50 == 0):
            print(f"step {step}: loss {mean.item():.4f}", flush=True)
    error = task.evaluate(engine, "test", micro_batch)["error"]  # by all, as ZeRO-3 needs it
    if rank == 0:
        print(f"test accuracy {100 - error:.2f} %")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
