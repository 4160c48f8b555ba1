"""megatron-core's own training: its DistributedDataParallel, its optimizers, ALTO or E inside.

The model is made of megatron-core's layers, which cut and mark their parameters; the loss is
linear in them, so that gradients are known. Whole layers are put together by the index maps of
megatron-core's optimizers. CUDA is mocked, as ``tests/cuda_on_cpu.py`` says.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import alto_ds
from alto_ds import states
from alto_ds.megatron import get_megatron_optimizer
from tests.cuda_on_cpu import cuda_on_cpu
from tests.sharding.harness import (
    AllReduceCounter,
    Case,
    NaiveALTO,
    deviation,
    ratio_deviation,
)

STEPS, BATCH, CLIPPING = 20, 16, 0.5
LEARNING_RATE, WEIGHT_DECAY = 0.05, 0.1
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.9, 0.99), "alpha": -5.0}
E_SETTINGS: dict[str, Any] = {"type": "E", "beta": 0.9, "alpha": -5.0}
WIDTH, EXPERTS = 20, 6
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (24, WIDTH),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
    "column.weight": (2 * WIDTH, WIDTH),
    "column.bias": (2 * WIDTH,),
    "row.weight": (WIDTH, 2 * WIDTH),
    "row.bias": (WIDTH,),
    "last_norm.weight": (WIDTH,),
    "last_norm.bias": (WIDTH,),
    "small.weight": (6, 10),
    "small.bias": (6,),
    **{f"experts.{i}.weight": (10, WIDTH) for i in range(EXPERTS)},
}


class Topology(NamedTuple):
    """Numbers of ranks, as ``initialize_model_parallel`` calls them."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1


@dataclass(frozen=True, kw_only=True)
class MegatronCase(Case):
    """One way of sharding, and the optimizer.

    Attributes:
        topology: numbers of ranks.
        layers: the first parts of the names of the model's layers.
        distributed: use DistributedOptimizer.
        bf16: train in bfloat16, with master weights in float32.
        settings: what ``get_megatron_optimizer`` is given.
        layer_wise: use LayerWiseDistributedOptimizer, which needs ``distributed=False``.
        naive: take a rank's part of a layer for a layer.
        own_groups: give megatron-core a collection of process groups.
    """

    topology: Topology = field(default_factory=Topology)
    layers: tuple[str, ...] = ("embedding", "norm", "column", "row", "last_norm")
    distributed: bool = True
    bf16: bool = False
    settings: dict[str, Any] = field(default_factory=lambda: SETTINGS)
    layer_wise: bool = False
    naive: bool = False
    own_groups: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return torch.bfloat16 if self.bf16 else torch.float32


class Chunk(nn.Module):
    """The layers of one chunk of the model; attributes as megatron-core's GPTModel has."""

    share_embeddings_and_output_weights = True

    def __init__(self, layers: Sequence[str], case: MegatronCase, config: Any) -> None:
        super().__init__()
        from megatron.core import parallel_state, tensor_parallel

        self.config = config
        self.pre_process = self.post_process = True
        options: dict[str, Any] = {"config": config, "init_method": nn.init.zeros_}
        column = functools.partial(tensor_parallel.ColumnParallelLinear, **options)
        make: dict[str, Callable[[], nn.Module]] = {
            "embedding": lambda: tensor_parallel.VocabParallelEmbedding(24, WIDTH, **options),
            "norm": lambda: nn.LayerNorm(WIDTH, dtype=case.dtype),
            "column": lambda: column(WIDTH, 2 * WIDTH),
            "row": lambda: tensor_parallel.RowParallelLinear(
                2 * WIDTH, WIDTH, bias=True, input_is_parallel=True, skip_bias_add=False, **options
            ),
            "last_norm": lambda: nn.LayerNorm(WIDTH, dtype=case.dtype),
            "small": lambda: nn.Linear(10, 6, dtype=case.dtype),
        }
        for name in layers:
            if name == "experts":
                group = parallel_state.get_expert_model_parallel_group()
                here = range(dist.get_rank(group), EXPERTS, dist.get_world_size(group))
                experts = {str(i): column(WIDTH, 10, bias=False, is_expert=True) for i in here}
                self.add_module(name, nn.ModuleDict(experts))
            else:
                self.add_module(name, make[name]())
        for name, param in self.named_parameters():
            param.data.copy_(part_of(first_value(name), param))

    def shared_embedding_or_output_weight(self) -> Tensor:
        """What the first and the last stage of a pipeline have copies of."""
        return self.get_parameter("embedding.weight")


@functools.cache
def first_value(name: str) -> Tensor:
    """A whole layer at the start, exact in bfloat16."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(SHAPES[name], generator=generator).mul(0.1).bfloat16().float()


@functools.cache
def gradients(name: str) -> Tensor:
    """``[STEPS · BATCH, *shape]``, the gradient of each sample's loss, multiples of 1/8."""
    generator = torch.Generator().manual_seed(1 + sum(map(ord, name)))
    return torch.randint(-8, 9, (STEPS * BATCH, *SHAPES[name]), generator=generator) / 8


@functools.cache
def sum_of_gradients(name: str, samples: range) -> Tensor:
    """Their sum over some samples, exact in any order."""
    return gradients(name)[samples.start : samples.stop].sum(0)


def tensor_parallel_group(param: Any) -> Any:
    """The ranks that have the other parts of a layer by tensor parallelism; None if there are none.

    By what megatron-core's own layers say, not by alto_ds.
    """
    from megatron.core import parallel_state

    if not getattr(param, "tensor_model_parallel", False):
        return None
    if getattr(param, "allreduce", True):
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def part_of(whole: Tensor, param: Any) -> Tensor:
    """This rank's part of a whole layer by tensor parallelism."""
    group = tensor_parallel_group(param)
    if group is None:
        return whole
    return whole.chunk(dist.get_world_size(group), param.partition_dim)[dist.get_rank(group)]


def stages(case: MegatronCase, config: Any) -> list[Chunk]:
    """This rank's part of the model: all of it, or two of the four chunks of a pipeline."""
    from megatron.core import parallel_state

    if case.topology.pipeline_model_parallel_size == 1:
        return [Chunk(case.layers, case, config)]
    first = parallel_state.get_pipeline_model_parallel_rank() == 0
    layers = (
        [("embedding", "norm"), ("column",)] if first else [("row",), ("last_norm", "embedding")]
    )
    chunks = [Chunk(names, case, config) for names in layers]
    tied = chunks[0 if first else -1].shared_embedding_or_output_weight()
    tied.shared_embedding = True  # type: ignore[attr-defined]
    tied.shared = not first  # type: ignore[attr-defined]
    return chunks


class Setup(NamedTuple):
    """What trains."""

    chunks: list[Any]  # in megatron-core's DistributedDataParallel
    config: Any
    named: dict[str, Any]  # this rank's parameters, by the names of SHAPES


def make_groups(topology: Topology) -> None:
    """Make megatron-core's process groups, unless they are there already."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        now = Topology(
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
        if now == topology:
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        **topology._asdict(), create_gloo_process_groups=False, distributed_timeout_minutes=1
    )


def set_up(case: MegatronCase) -> Setup:
    """Make megatron-core's process groups, the model and its wrappers, and the configuration."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    make_groups(case.topology)
    model_config = TransformerConfig(
        num_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        bf16=case.bf16,
        **case.topology._asdict(),
    )
    chunks = stages(case, model_config)
    named = {name: param for chunk in chunks for name, param in chunk.named_parameters()}
    wrapped = [
        DistributedDataParallel(
            model_config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=case.distributed, grad_reduce_in_fp32=True
            ),
            chunk,
            disable_bucketing=place > 0,
        )
        for place, chunk in enumerate(chunks)
    ]
    config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=0.0,
        weight_decay=WEIGHT_DECAY,
        clip_grad=CLIPPING,
        bf16=case.bf16,
        params_dtype=case.dtype,
        use_distributed_optimizer=case.distributed,
        **({"use_layer_wise_distributed_optimizer": True} if case.layer_wise else {}),
    )
    return Setup(wrapped, config, named)


def backward(setup: Setup, step: int) -> None:
    """Two micro batches of this rank, and megatron-core's exchange of gradients."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    data_group = parallel_state.get_data_parallel_group()
    tied = parallel_state.get_pipeline_model_parallel_world_size() > 1
    for chunk in setup.chunks:
        chunk.zero_grad_buffer()
    for micro in range(2):
        losses = []
        for name, param in setup.named.items():
            # An expert sees the samples of all ranks that have other experts.
            is_expert = not getattr(param, "allreduce", True)
            group = parallel_state.get_expert_data_parallel_group() if is_expert else data_group
            size = BATCH // dist.get_world_size(group) // 2
            begin = step * BATCH + (2 * dist.get_rank(group) + micro) * size
            grad = part_of(sum_of_gradients(name, range(begin, begin + size)), param)
            share = 0.5 if tied and name == "embedding.weight" else 1.0
            losses.append((param * grad.to(param) * share).sum())
        (torch.stack(losses).sum() * dist.get_world_size(data_group) / BATCH).backward()
    finalize_model_grads(setup.chunks)


class Twin:
    """The same optimizer on whole float32 layers in one process."""

    def __init__(self, case: MegatronCase) -> None:
        names = [name for name in SHAPES if name.split(".")[0] in case.layers]
        self.params = {name: nn.Parameter(first_value(name).clone()) for name in names}
        groups = [
            {"params": [(name, p)], "weight_decay": WEIGHT_DECAY * (p.ndim > 1)}
            for name, p in self.params.items()
        ]
        settings = {name: value for name, value in case.settings.items() if name != "type"}
        self.optimizer: Any
        if case.settings.get("type") == "E":
            base = torch.optim.AdamW(groups, lr=LEARNING_RATE)
            self.optimizer = alto_ds.E(base, **settings)
        else:
            self.optimizer = alto_ds.ALTO(groups, lr=LEARNING_RATE, **settings)

    def step(self, step: int, norm: float, lr: float, weight_decay: float) -> float:
        """Take a step on a global batch; return the norm of the gradient, which should be ``norm``.

        Gradients are clipped by ``norm`` as megatron-core does it, so that both have the same.
        """
        samples = range(step * BATCH, (step + 1) * BATCH)
        grads = {name: sum_of_gradients(name, samples) / BATCH for name in self.params}
        for name, param in self.params.items():
            param.grad = grads[name] * min(1.0, CLIPPING / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            (param,) = group["params"]
            group["lr"], group["weight_decay"] = lr, weight_decay * (param.ndim > 1)
        self.optimizer.step()
        return torch.stack([grad.norm() for grad in grads.values()]).norm().item()


class Piece(NamedTuple):
    """Elements of a parameter of this rank, where they are and what is kept of them."""

    part: int  # which part of the layer by tensor parallelism
    start: int
    values: dict[str, Tensor]


def parts_of(optimizer: Any) -> list[Any]:
    """The wrappers in megatron-core's chain that have parameters."""
    return [part for part in optimizer.chained_optimizers if part.optimizer is not None]


def pieces(optimizer: Any, setup: Setup) -> Iterator[tuple[str, Piece]]:
    """Master weights and states of what this rank updates, by megatron-core's own index maps."""
    names = {param: name for name, param in setup.named.items()}
    for part in parts_of(optimizer):
        for param, start, tensor in tensors_of(part, names):
            group = tensor_parallel_group(param)
            kept = {
                key: value.detach().flatten().clone()
                for key, value in part.optimizer.state[tensor].items()
                if isinstance(value, Tensor) and value.shape == tensor.shape
            }
            values = {"masters": tensor.detach().flatten().clone(), **kept}
            yield names[param], Piece(dist.get_rank(group) if group else 0, start, values)


def tensors_of(part: Any, names: Mapping[Any, str]) -> Iterator[tuple[Any, int, Tensor]]:
    """Parameter, first element and tensor of each piece in a wrapper."""
    for param in names:
        if hasattr(part, "model_param_group_index_map"):
            if param in part.model_param_group_index_map:
                group, place = part.model_param_group_index_map[param]
                start = part._get_model_param_range_map(param)["param"].start
                yield param, start, part.optimizer.param_groups[group]["params"][place]
        else:
            tensor = getattr(param, "main_param", param)
            if any(tensor is held for g in part.optimizer.param_groups for held in g["params"]):
                yield param, 0, tensor


def assemble(optimizer: Any, setup: Setup) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Whole layers by what is kept of them, and the number of elements whose copies differ."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dims = {
        name: (p.partition_dim if tensor_parallel_group(p) else 0, p.shape)
        for name, p in setup.named.items()
    }
    dist.all_gather_object(everyone, (dims, list(pieces(optimizer, setup))))
    flat: dict[tuple[str, str], dict[int, Tensor]] = {}
    dims = {name: dim for found, _ in everyone for name, dim in found.items()}
    differ = 0
    for name, piece in (entry for _, found in everyone for entry in found):
        for key, values in piece.values.items():
            parts = flat.setdefault((key, name), {})
            size = dims[name][1].numel()
            known = parts.setdefault(piece.part, torch.full((size,), torch.nan))
            known = known[piece.start : piece.start + len(values)]
            differ += int(((known != values) & ~known.isnan()).sum())
            known.copy_(values)
    whole: dict[str, dict[str, Tensor]] = {}
    for (key, name), parts in flat.items():
        dim, shape = dims[name]
        layer = torch.cat([parts[i].view(shape) for i in sorted(parts)], dim)
        assert layer.shape == SHAPES[name], f"{key} of {name}"
        assert not layer.isnan().any(), f"{key} of {name}"
        whole.setdefault(key, {})[name] = layer
    return whole, differ


def expected_bytes(part: Any, setup: Setup) -> list[int]:
    """The bytes of each all-reduce in a step, by megatron-core's buffers and marks."""
    params = {p for group in part.optimizer.param_groups for p in group["params"]}
    owned = [param for param in setup.named.values() if param in params]
    owned += [p for p in setup.named.values() if getattr(p, "main_param", None) in params]
    sent = []
    if hasattr(part, "buffers"):
        owned = [param for buffer in part.buffers for param in buffer.param_index_map]
        if dist.get_world_size(part.data_parallel_group) > 1:
            sent.append(16 * (len(owned) + 1))
    groups = [tensor_parallel_group(param) for param in owned]
    cut = sum(group is not None and dist.get_world_size(group) > 1 for group in groups)
    return [*sent, 16 * (cut + 1)] if cut else sent


def train(case: MegatronCase, _: Path) -> dict[str, Any]:
    """Train with megatron-core beside the twin, and compare all that they hold."""
    with cuda_on_cpu():
        return _train(case, set_up(case))


def _train(case: MegatronCase, setup: Setup) -> dict[str, Any]:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.process_groups_config import ProcessGroupCollection

    twin = Twin(case)
    optimizer = get_megatron_optimizer(
        setup.config,
        setup.chunks,
        use_gloo_process_groups=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups() if case.own_groups else None,
        **case.settings,
    )
    parts = parts_of(optimizer)
    if case.naive:
        for part in parts:
            part.optimizer.__class__ = NaiveALTO
    scheduler = OptimizerParamScheduler(
        *(optimizer, 0.01, LEARNING_RATE, 0.0),
        **{"lr_warmup_steps": 5, "lr_decay_steps": 30, "lr_decay_style": "cosine"},
        **{"start_wd": WEIGHT_DECAY / 2, "end_wd": WEIGHT_DECAY},
        **{"wd_incr_steps": STEPS, "wd_incr_style": "linear"},
    )
    counters = [AllReduceCounter(part.optimizer) for part in parts]
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(setup, step)
        lr, weight_decay = scheduler.get_lr({}), scheduler.get_wd()
        succeeded, norm, _ = optimizer.step()
        assert succeeded
        norms.append(abs(twin.step(step, norm, lr, weight_decay) / norm - 1))
        scheduler.step(1)
    found, differ = assemble(optimizer, setup)
    masters = {name: param.detach() for name, param in twin.params.items()}
    kept = (states.E_EXP_AVG_GRAD,) if case.settings.get("type") == "E" else (states.EXP_AVG_GRAD,)
    result = {
        "held": [{name: tensor.numel() for name, tensor in held_by(part, setup)} for part in parts],
        "sent": [counter.calls for counter in counters],
        "expected": [expected_bytes(part, setup) for part in parts],
        "norm": max(norms),
        "copies_differ": differ,
        "moved": deviation(masters, {name: first_value(name) for name in masters}),
        "masters": deviation(found["masters"], masters),
        "states": {
            key: deviation(
                found[key], {n: twin.optimizer.state[p][key] for n, p in twin.params.items()}
            )
            for key in (*kept, states.EXP_AVG, states.EXP_AVG_SQ)
        },
        "weights": deviation(
            {name: param.detach().float() for name, param in setup.named.items()},
            {name: part_of(masters[name], param) for name, param in setup.named.items()},
        ),
        "wrappers": sorted({type(part).__name__ for part in parts}),
    }
    if isinstance(twin.optimizer, alto_ds.ALTO) and not case.naive:
        ratios: dict[str, Any] = {}
        for part in parts:
            ratios |= part.optimizer.trust_ratios(setup.named.items())
        expected = twin.optimizer.trust_ratios()
        told = itertools.chain.from_iterable(result["held"]) if case.layer_wise else setup.named
        result["ratios"] = ratio_deviation(ratios, {n: expected[n] for n in told})
        result["scaled"] = sorted(name for name, ratio in ratios.items() if ratio.scaled)
    return result


def held_by(part: Any, setup: Setup) -> Iterator[tuple[str, Tensor]]:
    """The layers of which a wrapper holds a piece on this rank."""
    names = {param: name for name, param in setup.named.items()}
    for param, _, tensor in tensors_of(part, names):
        yield names[param], tensor


def refuse(case: MegatronCase, _: Path) -> dict[str, Any]:
    """What is refused, each time on this rank as on all, though one rank alone may know of it."""
    with cuda_on_cpu():
        setup = set_up(case)
        before = [sorted(vars(param)) for param in setup.named.values()]
        found = {name: _refused(setup, name, *where) for name, where in REFUSED.items()}
        after = [sorted(vars(param)) for param in setup.named.values()]
    return {"messages": found, "untouched": after == before}  # megatron-core marks parameters


def _refused(setup: Setup, name: str, where: str, value: Any) -> str:
    """The error where one setting is ``value``."""
    place: Any = {
        "config": setup.config,
        "ddp": setup.chunks[0].ddp_config,
        "config on rank 3": setup.chunks[0].config if dist.get_rank() == 3 else None,
        "model on rank 3": setup.chunks[0].module if dist.get_rank() == 3 else None,
    }.get(where)
    own = {name: value} if where == "ours" else {}
    set_here: Any = contextlib.nullcontext()
    if place is not None:
        set_here = mock.patch.object(place, name, value, create=True)  # not all versions have all
    with set_here:
        try:
            get_megatron_optimizer(setup.config, setup.chunks, use_gloo_process_groups=False, **own)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


class GroupedMLP(nn.Module):
    """A stand-in for megatron-core's, which needs a package for CUDA."""

    expert_parallel = True


class Expert(nn.Module):
    """Of megatron-core's layers what says that they are an expert's."""

    is_expert = True


# Where a setting is, and the value that is refused.
REFUSED: dict[str, tuple[str, Any]] = {
    "use_precision_aware_optimizer": ("config", True),
    "optimizer_cpu_offload": ("config", True),
    "optimizer_cuda_graph": ("config", True),
    "optimizer": ("config", "sgd"),
    "fp16": ("config", True),
    "decoupled_weight_decay": ("config", False),
    "use_layer_wise_distributed_optimizer": ("config", True),
    "num_distributed_optimizer_instances": ("ddp", 2),
    "use_megatron_fsdp": ("ddp", True),
    "fp8_param": ("config on rank 3", True),
    "fp4_param": ("config on rank 3", True),
    "gtp_weight_remat_size": ("config on rank 3", 2),
    "expert_gtp_weight_remat_size": ("config on rank 3", 2),
    "perform_initialization": ("config on rank 3", False),
    "grouped": ("model on rank 3", GroupedMLP()),
    "expert": ("model on rank 3", Expert()),
    "lr": ("ours", 0.1),
    "weight_decay": ("ours", 0.1),
    "alhpa": ("ours", -5.0),
    "type": ("ours", "LAMB"),
    "betas": ("ours", (0.9, 0.999)),
    "nonfinite": ("ours", "skip"),
}

MEGATRON: dict[str, Any] = {"needs": "megatron-core"}
LAYER_WISE: dict[str, Any] = {
    "needs": "megatron-core>=0.18",
    "distributed": False,
    "layer_wise": True,
}
MOE = ("norm", "row", "experts")
WRAPPERS: dict[str, dict[str, Any]] = {
    "distributed-fp32": {},
    "distributed-bf16": {"bf16": True},
    "float16": {"bf16": True, "distributed": False},
    "fp32": {"distributed": False},
}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2": {"topology": Topology(2)},
    "pp2": {"topology": Topology(1, 2)},
    "ep2": {"topology": Topology(1, 1, 2), "layers": MOE},
}
# What other rows prove as well, or what sends nothing.
SLOW = (
    *(("dp4", "float16"), ("dp4", "fp32"), ("tp2", "distributed-fp32")),
    *(("pp2", "distributed-bf16"), ("pp2", "fp32")),
    *(("ep2", "distributed-fp32"), ("ep2", "float16")),
)

CASES = {
    **{
        f"megatron-{name}-{wrapper}": MegatronCase(
            measures=train, **MEGATRON, **place, **options, slow=(name, wrapper) in SLOW
        )
        for name, place in TOPOLOGIES.items()
        for wrapper, options in WRAPPERS.items()
    },
    # Experts are whole where the other layers are cut by tensor parallelism, and the reverse. In
    # the second row all that decays is in the optimizer of the experts.
    "megatron-tp2-ep2": MegatronCase(
        measures=train, **MEGATRON, topology=Topology(2, 1, 2, 1), layers=MOE
    ),
    "megatron-ep2-etp2": MegatronCase(
        measures=train,
        **MEGATRON,
        topology=Topology(1, 1, 2, 2),
        layers=("norm", "experts"),
        own_groups=True,
    ),
    "megatron-dp4-layer-wise-bf16": MegatronCase(measures=train, **LAYER_WISE, bf16=True),
    "megatron-tp2-layer-wise-bf16": MegatronCase(
        measures=train, **LAYER_WISE, topology=Topology(2), bf16=True
    ),
    "megatron-tp2-layer-wise-fp32": MegatronCase(
        measures=train, **LAYER_WISE, topology=Topology(2)
    ),
    "megatron-ep2-layer-wise-bf16": MegatronCase(
        measures=train, **LAYER_WISE, topology=Topology(1, 1, 2), layers=MOE, bf16=True
    ),
    "megatron-small": MegatronCase(measures=train, **MEGATRON, layers=("small",)),
    "megatron-bf16-states": MegatronCase(
        measures=train, **MEGATRON, settings=SETTINGS | {"state_dtype": "bf16"}
    ),
    "megatron-e": MegatronCase(
        measures=train, **MEGATRON, topology=Topology(2), bf16=True, settings=E_SETTINGS
    ),
    "megatron-dp4-naive": MegatronCase(measures=train, **MEGATRON, naive=True),
    "megatron-tp2-naive": MegatronCase(
        measures=train, **MEGATRON, topology=Topology(2), distributed=False, naive=True
    ),
    "megatron-refused": MegatronCase(measures=refuse, **MEGATRON, topology=Topology(2)),
}
