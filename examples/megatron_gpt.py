"""Pre-train a GPT of megatron-core with ALTO, on text in Megatron's ``.bin/.idx``.

    torchrun --nproc_per_node 4 examples/megatron_gpt.py --tensor_parallel 2
    torchrun --nproc_per_node 4 examples/megatron_gpt.py --tensor_parallel 2 --deepspeed

One GPU for each rank. The first trains as Megatron-LM does, with megatron-core's
DistributedOptimizer; the second by DeepSpeed's ZeRO-1. Both print the same losses, on any number
of ranks. Needs alto-ds[pretrain] and megatron-core.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tokenizers import MegatronTokenizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.utils.data import default_collate

from alto_ds.megatron import get_megatron_optimizer, mpu
from alto_ds.pretrain.data.prepare import prepare
from alto_ds.pretrain.data.shards import manifest_of, read_record, shard_prefix, tokenizer_of
from alto_ds.pretrain.settings import DataSettings

WEIGHT_DECAY, CLIPPING = 1e-4, 1.0
ALTO: dict[str, Any] = {"betas": (0.01, 0.9, 0.99), "alpha": 0.5}  # for small global batches


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument(
        "--data",
        help="prefix of alto_ds.pretrain.prepare; otherwise some of Python's standard library "
        "is prepared in runs/megatron_gpt",
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--global_batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences at once on a rank")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--seq_length", type=int, default=64)
    parser.add_argument("--tensor_parallel", type=int, default=1, help="ranks that share a layer")
    parser.add_argument("--deepspeed", action="store_true", help="train by DeepSpeed's ZeRO-1")
    return parser.parse_args(argv)


def prepared() -> str:
    """Prepare text of Python's standard library, once; all ranks call this together."""
    prefix = Path("runs/megatron_gpt/python")
    if dist.get_rank() == 0:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        text = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]
        prepare(DataSettings(text=text, vocab_size=1000), str(prefix), shards=2, processes=1)
    dist.barrier()
    return str(prefix)


def sequences(prefix: str, args: argparse.Namespace) -> tuple[Any, int]:
    """megatron-core's own dataset of a prepared text, and the size of its vocabulary."""
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(tokenizer_of(prefix)), metadata_path={"library": "huggingface"}
    )
    shards = len(read_record(manifest_of(prefix)))
    prefixes = [shard_prefix(prefix, number, shards) for number in range(shards)]
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=args.seq_length,
        blend_per_split=[(prefixes, None), None, None],  # all of the text is to train on
        path_to_cache=f"{prefix}-cache",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = (args.steps * args.global_batch, 0, 0)
    training, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return training, tokenizer.vocab_size


def micro_batches(data: Any, step: int, args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's part of a global batch; all ranks of a tensor-parallel group read one."""
    own = args.global_batch // parallel_state.get_data_parallel_world_size()
    first = step * args.global_batch + parallel_state.get_data_parallel_rank() * own
    for start in range(first, first + own, args.micro_batch):
        rows = [data[number % len(data)] for number in range(start, start + args.micro_batch)]
        yield {name: value.cuda() for name, value in default_collate(rows).items()}


def make_model(vocab_size: int, args: argparse.Namespace) -> GPTModel:
    """A small GPT with the same weights at each call, however tensor parallelism cuts them."""
    torch.manual_seed(1234)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tensor_parallel,
        use_cpu_initialization=True,  # whole layers are drawn, and each rank keeps its part
    )
    divisor = 128 * args.tensor_parallel  # so that the ranks' parts of the vocabulary are equal
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=-(-vocab_size // divisor) * divisor,
        max_sequence_length=args.seq_length,
        share_embeddings_and_output_weights=True,
    ).cuda()


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of a micro batch."""
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses.mean()


def train_by_megatron(model: GPTModel, data: Any, args: argparse.Namespace) -> Iterator[Tensor]:
    """Yield this rank's mean loss of each step."""
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    config = OptimizerConfig(
        optimizer="adam",  # megatron-core's own choice; alto_ds puts ALTO in its place
        lr=args.lr,
        weight_decay=WEIGHT_DECAY,
        clip_grad=CLIPPING,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, [ddp], **ALTO)
    # It also sets each group's weight decay, 0 for biases and norms.
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.lr,
        lr_warmup_steps=0,
        lr_decay_steps=args.steps,
        lr_decay_style="constant",
        start_wd=WEIGHT_DECAY,
        end_wd=WEIGHT_DECAY,
        wd_incr_steps=args.steps,
        wd_incr_style="constant",
    )

    def forward_step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        return loss_of(model, next(batches)), lambda loss: (loss, loss.detach().clone())

    forward_backward = get_forward_backward_func()
    data_ranks = parallel_state.get_data_parallel_world_size()
    for step in range(args.steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=micro_batches(data, step, args),
            model=[ddp],
            num_microbatches=args.global_batch // (args.micro_batch * data_ranks),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(increment=1)
        yield torch.stack(losses).mean()


def train_by_deepspeed(model: GPTModel, data: Any, args: argparse.Namespace) -> Iterator[Tensor]:
    """Yield this rank's mean loss of each step."""
    import deepspeed

    matrices = [param for param in model.parameters() if param.ndim > 1]
    others = [param for param in model.parameters() if param.ndim <= 1]  # biases and norms
    params = {"lr": args.lr, "weight_decay": WEIGHT_DECAY, **ALTO}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        mpu=mpu(),
        config={
            "train_batch_size": args.global_batch,
            "train_micro_batch_size_per_gpu": args.micro_batch,
            "optimizer": {"type": "ALTO", "params": params},
            "zero_optimization": {"stage": 1},
            "gradient_clipping": CLIPPING,
        },
    )
    for step in range(args.steps):
        losses = []
        for batch in micro_batches(data, step, args):
            loss = loss_of(engine, batch)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        yield torch.stack(losses).mean()


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, print the loss of each step, and return them; all ranks call this together."""
    args = arguments(argv)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tensor_parallel)
    model_parallel_cuda_manual_seed(1234)
    at_once = args.micro_batch * parallel_state.get_data_parallel_world_size()
    if args.global_batch % at_once:
        sys.exit(
            f"--global_batch={args.global_batch} must be a multiple of {at_once}, "
            f"--micro_batch={args.micro_batch} on all data-parallel ranks"
        )
    data, vocab_size = sequences(args.data or prepared(), args)
    train = train_by_deepspeed if args.deepspeed else train_by_megatron
    found = []
    for step, loss in enumerate(train(make_model(vocab_size, args), data, args)):
        data_ranks = parallel_state.get_data_parallel_group()
        dist.all_reduce(loss, group=data_ranks)
        found.append(loss.item() / dist.get_world_size(data_ranks))
        if dist.get_rank() == 0:
            print(f"step {step}: loss {found[-1]:.6f}", flush=True)
    parallel_state.destroy_model_parallel()
    return found


if __name__ == "__main__":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    main()
    dist.destroy_process_group()
