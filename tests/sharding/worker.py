"""One rank of the sharding matrix; run by torchrun, all cases in one launch.

For each case a real DeepSpeed engine trains a small model for a number of steps. What the
optimizer received and what it made of it is put together from all ranks, from DeepSpeed's own
lists, and compared with the yardstick: ALTO on whole tensors in this process, given the same
gradients. Rank 0 writes what it measured as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

import alto_ds
import alto_ds.adaptor
from tests.sharding.cases import CASES, CLIPPING, STEPS, Case, NaiveALTO

STATES = ("exp_avg_grad", "e_exp_avg_grad", "exp_avg", "exp_avg_sq")
POISON = (1e30, float("nan"))


class Model(nn.Module):
    """Layers of many sizes whose gradients are known: the loss is linear in the weights.

    The gradient of sample i is a tensor of multiples of 1/8, the same on any rank, so that
    averages over powers of two are exact in any order. ``tied`` is used twice, ``dead`` never,
    ``zero`` starts with norm 0, ``frozen`` needs no gradient, ``lone`` is a group of one element.
    """

    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        "matrix": (37, 11),
        "scalar": (1,),
        "thin": (64, 3),
        "dead": (7,),
        "zero": (3, 3),
        "vector": (129,),
        "frozen": (10,),
        "tied": (6, 9),
        "bias": (13,),
        "norm": (1,),
        "lone": (1,),
    }
    NO_DECAY = ("bias", "norm")
    overflows = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1234)
        for name, shape in self.SHAPES.items():
            value = torch.randn(shape, generator=generator) * (0.0 if name == "zero" else 0.5)
            self.register_parameter(name, nn.Parameter(value, requires_grad=name != "frozen"))

    def groups(self) -> list[dict[str, Any]]:
        """Decayed parameters, others at another learning rate, and a group of one element."""
        named = dict(self.named_parameters())
        lone = named.pop("lone")
        return [
            {"params": [p for n, p in named.items() if n not in self.NO_DECAY]},
            {"params": [named[n] for n in self.NO_DECAY], "weight_decay": 0.0, "lr": 0.01},
            {"params": [lone]},
        ]

    @classmethod
    @functools.cache
    def sum_of_gradients(cls, samples: range) -> dict[str, Tensor]:
        """Sum of the gradients of the samples' losses for each layer, exact in float32."""
        sums = {name: torch.zeros(shape) for name, shape in cls.SHAPES.items()}
        for sample in samples:
            generator = torch.Generator().manual_seed(sample)
            for total in sums.values():
                total += torch.randint(-8, 9, total.shape, generator=generator) / 8
        return sums

    @classmethod
    def clipped_gradients(cls, samples: range, clipping: float) -> dict[str, Tensor]:
        """Mean gradient over ``samples``, clipped as a whole: what the optimizer must receive."""
        mean = {n: grad / len(samples) for n, grad in cls.sum_of_gradients(samples).items()}
        del mean["frozen"]
        mean["dead"] = torch.zeros_like(mean["dead"])
        norm = torch.stack([grad.norm() for grad in mean.values()]).norm()
        return {name: grad * min(1.0, clipping / norm.item()) for name, grad in mean.items()}

    @classmethod
    def group_of(cls, name: str) -> int:
        """Index of the parameter's group in :meth:`groups`."""
        return 1 if name in cls.NO_DECAY else 2 if name == "lone" else 0

    def forward(self, samples: range) -> Tensor:
        """Mean loss of ``samples``."""
        losses = []
        for name, grad in self.sum_of_gradients(samples).items():
            param = getattr(self, name)
            if name == "tied":
                half = grad.to(param) / 2
                losses += [(param * half).sum(), (half * param).sum()]
            elif name not in ("dead", "frozen"):
                losses.append((param * grad.to(param)).sum())
        loss = torch.stack(losses).sum() / len(samples)
        return loss * float("inf") if self.overflows else loss


class Piece(NamedTuple):
    """A range of a parameter in a tensor, found from DeepSpeed's lists, not from alto_ds."""

    name: str
    start: int
    length: int
    offset: int


def pieces_of(engine: Any, alto: alto_ds.ALTO) -> dict[Tensor, list[Piece]]:
    """For each tensor of this rank's optimizer the parameters' ranges in it."""
    wrapper = engine.optimizer
    names = {param: name for name, param in engine.module.named_parameters()}
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3
        pieces: dict[Tensor, list[Piece]] = {}
        for flat, params in zip(
            wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True
        ):
            pieces[flat], offset = [], 0
            for param in params:
                part = -(-param.ds_numel // dist.get_world_size())
                start = min(dist.get_rank() * part, param.ds_numel)
                length = min(part, param.ds_numel - start)
                pieces[flat].append(Piece(names[param], start, length, offset))
                offset += part
        return pieces
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None)
    orders = getattr(wrapper, "round_robin_bit16_groups", None)
    if flats is None:
        flats = getattr(wrapper, "fp32_groups_flat_partition", None)
        orders = getattr(wrapper, "bf16_groups", None)
    if flats is not None and orders is not None:
        pieces = {}
        for flat, params in zip(flats, orders, strict=True):
            begin = dist.get_rank() * flat.numel()
            pieces[flat], position = [], 0
            for param in params:
                low, high = (
                    max(position, begin),
                    min(position + param.numel(), begin + flat.numel()),
                )
                if low < high:
                    pieces[flat].append(
                        Piece(names[param], low - position, high - low, low - begin)
                    )
                position += param.numel()
        return pieces
    masters = [tensor for group in alto.param_groups for tensor in group["params"]]
    owners = [
        param
        for group in engine.module.groups()
        for param in group["params"]
        if wrapper is alto or param.requires_grad
    ]
    return {
        tensor: [Piece(names[param], 0, param.numel(), 0)]
        for tensor, param in zip(masters, owners, strict=True)
    }


def padding_of(tensor: Tensor, pieces: Iterable[Piece]) -> Tensor:
    """Mask of the elements that belong to no parameter."""
    mask = torch.ones(tensor.numel(), dtype=torch.bool)
    for piece in pieces:
        mask[piece.offset : piece.offset + piece.length] = False
    return mask


def assemble(
    values: dict[Tensor, Tensor], pieces: dict[Tensor, list[Piece]], sharded: bool
) -> dict[str, Tensor]:
    """Whole layers from the parts that all ranks hold; each element must be there just once."""
    mine = [
        (p.name, p.start, value.detach().flatten()[p.offset : p.offset + p.length].clone())
        for tensor, value in values.items()
        for p in pieces[tensor]
    ]
    if sharded:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        mine = [part for parts in everyone for part in parts]
    whole: dict[str, Tensor] = {}
    for name, start, part in sorted(mine, key=lambda part: part[:2]):
        done = whole.get(name, part.new_empty(0))
        assert done.numel() == start, f"{name}: {done.numel()} elements before element {start}"
        whole[name] = torch.cat([done, part])
    for name, value in whole.items():
        shape = Model.SHAPES[name]
        assert value.numel() == torch.Size(shape).numel(), f"{name}: parts are missing"
        whole[name] = value.view(shape)
    return whole


class Recorder:
    """Sees each gradient that the optimizer receives, and poisons all padding before each step.

    The padding of gradients is put back after the step, for DeepSpeed goes on with some of it.
    """

    def __init__(self, pieces: dict[Tensor, list[Piece]]) -> None:
        self.pieces = pieces
        self.grads: list[dict[Tensor, Tensor]] = []
        self.grad_padding: dict[Tensor, Tensor] = {}
        self.sent: list[list[int]] = []  # bytes of each all-reduce in each call of step()
        self.all_reduce = dist.all_reduce
        self.padding = 0

    def counted_all_reduce(self, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        self.sent[-1].append(tensor.numel() * tensor.element_size())
        return self.all_reduce(tensor, *arguments, **options)

    def after(self, *_: Any) -> None:
        dist.all_reduce = self.all_reduce
        for tensor, padding in self.grad_padding.items():
            assert tensor.grad is not None
            tensor.grad[padding_of(tensor, self.pieces[tensor])] = padding
        self.grad_padding.clear()

    def before(self, alto: alto_ds.ALTO, *_: Any) -> None:
        self.sent.append([])
        dist.all_reduce = self.counted_all_reduce
        for group in alto.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                self.grads[-1][tensor] = tensor.grad.clone()
                padding = padding_of(tensor, self.pieces[tensor])
                self.padding = max(self.padding, int(padding.sum()))
                if padding.any():
                    self.grad_padding[tensor] = tensor.grad[padding].clone()
                    poisoned = [tensor.data, tensor.grad]
                    poisoned += [alto.state[tensor][k] for k in STATES if k in alto.state[tensor]]
                    for number, victim in enumerate(poisoned):
                        victim[padding] = POISON[(number + len(self.grads)) % 2]


class Yardstick:
    """ALTO on whole float32 tensors in one process, with the settings of a case."""

    def __init__(self, masters: dict[str, Tensor], case: Case) -> None:
        self.params = {name: nn.Parameter(value.clone()) for name, value in masters.items()}
        groups = [
            {"params": [(n, p)]} | ({"weight_decay": 0.0} if n in Model.NO_DECAY else {})
            for n, p in self.params.items()
        ]
        make = alto_ds.adaptor.from_config if case.optimizer_type == "E" else alto_ds.ALTO
        self.optimizer = make(groups, **case.settings)

    def step(self, grads: dict[str, Tensor], lr: list[float]) -> None:
        for group in self.optimizer.param_groups:
            (name,) = group["param_names"]
            self.params[name].grad = grads.get(name)
            group["lr"] = lr[Model.group_of(name)]
        self.optimizer.step()


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ over the layers."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    worst = 0.0
    for name, right in expected.items():
        scale = right.double().norm().item()
        error = (found[name].double() - right.double()).norm().item()
        relative = error / scale if scale else error
        worst = max(worst, relative) if relative == relative else float("inf")
    return worst


def bare(engine: Any) -> Any:
    """The optimizer inside DeepSpeed's wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def make_engine(case: Case) -> Any:
    """A DeepSpeed engine for the case."""
    config = case.json(dist.get_world_size())
    if case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Model()
    else:
        model = Model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.groups(), config=config)
    return engine


def train_step(engine: Any, case: Case, step: int) -> None:
    """One optimizer step on the global batch number ``step``."""
    batch = case.batch(dist.get_world_size())
    micro = batch // case.gas // dist.get_world_size()
    for accumulated in range(case.gas):
        first = step * batch + (accumulated * dist.get_world_size() + dist.get_rank()) * micro
        engine.backward(engine(range(first, first + micro)))
        engine.step()


def run_case(case: Case) -> dict[str, Any]:
    """Train, compare with the yardstick, and return what was measured on all ranks."""
    engine = make_engine(case)
    alto = bare(engine)
    pieces = pieces_of(engine, alto)
    masters = {tensor: tensor for tensor in pieces}
    initial = assemble(masters, pieces, case.sharded)
    yardstick = Yardstick(initial, case)
    recorder = Recorder(pieces)
    alto.register_step_pre_hook(recorder.before)
    alto.register_step_post_hook(recorder.after)
    gradient_error = 0.0
    for step in range(STEPS):
        recorder.grads.append({})
        lr = [group["lr"] for group in alto.param_groups]
        train_step(engine, case, step)
        grads = assemble(recorder.grads[-1], pieces, case.sharded)
        batch = case.batch(dist.get_world_size())
        expected = Model.clipped_gradients(range(step * batch, (step + 1) * batch), CLIPPING)
        gradient_error = max(gradient_error, deviation(grads, {n: expected[n] for n in grads}))
        yardstick.step(grads, lr)

    expected = {n: p.detach() for n, p in yardstick.params.items()}
    result: dict[str, Any] = {
        "wrapper": type(engine.optimizer).__name__,
        "optimizer": type(alto).__name__,
        "parameters": sum(value.numel() for value in expected.values()),
        "gradients": gradient_error,
        "masters": deviation(assemble(masters, pieces, case.sharded), expected),
        "moved": deviation(expected, initial),
        "weights": {n: p.double().flatten()[:50].tolist() for n, p in expected.items()},
    }
    for key in STATES:
        stateful = {t for t in pieces if key in alto.state[t]}
        found = assemble({t: alto.state[t][key] for t in stateful}, pieces, case.sharded)
        right = {
            n: yardstick.optimizer.state[p][key]
            for n, p in yardstick.params.items()
            if key in yardstick.optimizer.state[p]
        }
        result[key] = deviation(found, right)
    if isinstance(yardstick.optimizer, alto_ds.ALTO):
        result["ratios"] = alto.trust_ratios(engine.module.named_parameters())
        result["right_ratios"] = yardstick.optimizer.trust_ratios()
    result["straddling"] = [
        p.name
        for parts in pieces.values()
        for p in parts
        if 0 < p.length < torch.Size(Model.SHAPES[p.name]).numel()
    ]
    result["fragments"] = sum(p.length > 0 for parts in pieces.values() for p in parts)
    result["padding_only"] = any(all(p.length == 0 for p in parts) for parts in pieces.values())
    result["padding"] = recorder.padding
    result["sent"] = recorder.sent
    result["state_bytes"] = sum(
        value.numel() * value.element_size()
        for state in alto.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    result["owned"] = sum(tensor.numel() for tensor in pieces)
    engine.destroy()
    return from_all(result)


def snapshot(alto: Any, pieces: dict[Tensor, list[Piece]]) -> list[Tensor]:
    """Copies of the layers' parts in weights and states, and the numbers of steps."""
    values = []
    for tensor, parts in pieces.items():
        state = alto.state[tensor]
        states = [value for _, value in sorted(state.items()) if torch.is_tensor(value)]
        flats = [tensor, *(value for value in states if value.shape == tensor.shape)]
        for flat in flats:
            values += [flat.flatten()[p.offset : p.offset + p.length] for p in parts]
        values.append(torch.as_tensor(state.get("step", 0)))
    return [value.detach().clone() for value in values]


def changes(left: list[Tensor], right: list[Tensor]) -> int:
    """How many of the tensors differ in a bit."""
    assert len(left) == len(right)
    return sum(not torch.equal(a, b) for a, b in zip(left, right, strict=True))


def from_all(result: dict[str, Any]) -> dict[str, Any]:
    """The results of all ranks, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, result)
    return {"ranks": everyone}


def run_resume(case: Case) -> dict[str, Any]:
    """Save, train on, load, and train on again: both ways on must be the same to the bit."""
    engine = make_engine(case)
    alto = bare(engine)
    pieces = pieces_of(engine, alto)
    folder = os.path.join(os.path.dirname(sys.argv[1]), f"{id_of(case)}")
    for step in range(3):
        train_step(engine, case, step)
    engine.save_checkpoint(folder)
    for step in range(3, 6):
        train_step(engine, case, step)
    straight = snapshot(alto, pieces)
    engine.destroy()

    engine = make_engine(case)  # anew, as another process would
    alto = bare(engine)
    pieces = pieces_of(engine, alto)
    engine.load_checkpoint(folder)
    for step in range(3, 6):
        train_step(engine, case, step)
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "changed_by_resuming": changes(straight, snapshot(alto, pieces)),
        "tensors": len(straight),
    }
    engine.destroy()
    return from_all(result)


def id_of(case: Case) -> str:
    """The case's name."""
    return next(name for name, candidate in CASES.items() if candidate is case)


def run_ddp(case: Case) -> dict[str, Any]:
    """DistributedDataParallel without DeepSpeed, against the yardstick on the whole batch."""
    model = Model()
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    alto = alto_ds.ALTO(model.groups(), **case.settings)
    yardstick = Yardstick(
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, case
    )
    world_size, batch = dist.get_world_size(), case.batch(dist.get_world_size())
    own = batch // world_size
    for step in range(STEPS):
        first = step * batch + dist.get_rank() * own
        model.zero_grad()
        ddp(range(first, first + own)).backward()
        used = {n for n, p in model.named_parameters() if p.grad is not None}
        whole = Model.clipped_gradients(range(step * batch, (step + 1) * batch), float("inf"))
        yardstick.step(
            {name: grad for name, grad in whole.items() if name in used},
            [group["lr"] for group in alto.param_groups],
        )
        alto.step()
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p.detach() for n, p in yardstick.params.items()}
    return from_all({"masters": deviation(found, expected)})


def run_overflow(case: Case) -> dict[str, Any]:
    """Skip a step by an overflow on the last rank only; compare masters and states around it."""
    engine = make_engine(case)
    alto = bare(engine)
    pieces = pieces_of(engine, alto)
    for step in range(3):
        train_step(engine, case, step)
    before = snapshot(alto, pieces)
    engine.module.overflows = dist.get_rank() == dist.get_world_size() - 1
    train_step(engine, case, 3)
    skipped = snapshot(alto, pieces)
    engine.module.overflows = False
    train_step(engine, case, 4)
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "changed_by_skipped": changes(before, skipped),
        "changed_by_next": changes(skipped, snapshot(alto, pieces)),
        "skipped_steps": engine.skipped_steps,
    }
    engine.destroy()
    return from_all(result)


def run_refused(case: Case) -> dict[str, Any]:
    """The error when the engine is made or at the optimizer's first step; did weights change?"""
    result: dict[str, Any] = {"message": "none", "changed": 0}
    try:
        engine = make_engine(case)
    except RuntimeError as error:
        return from_all(result | {"message": str(error)})
    tensors = [tensor for group in bare(engine).param_groups for tensor in group["params"]]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        for step in range(3):  # ZenFlow does not step the optimizer at once
            train_step(engine, case, step)
    except RuntimeError as error:
        result["message"] = str(error)
    result["changed"] = changes(before, tensors)
    engine.destroy()
    return from_all(result)


RUNS = {"overflow": run_overflow, "resume": run_resume, "ddp": run_ddp, "refused": run_refused}


def main() -> None:
    torch.set_num_threads(1)
    torch.optim.NaiveALTO = NaiveALTO  # type: ignore[attr-defined]
    # Compiling this op takes longer than all the cases; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=60))
    if not get_accelerator().is_fp16_supported():
        # A mock where hardware is missing: few CPUs have fp16 arithmetic, and DeepSpeed refuses
        # the rest, though PyTorch computes it on any.
        get_accelerator().is_fp16_supported = lambda: True
    results = {}
    for name, case in CASES.items():
        if dist.get_world_size() in case.worlds:
            try:
                kind = name.split("-")[0]
                results[name] = RUNS.get(kind, run_case)(case)
            except Exception:
                results[name] = {"error": traceback.format_exc()}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
