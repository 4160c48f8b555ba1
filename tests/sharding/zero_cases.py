"""DeepSpeed's engines and ZeRO stages: rows of configurations, and what is measured of them.

For each row a real engine trains a small model. What the optimizer received and what it made of
it is put together from all ranks, from DeepSpeed's own lists, and compared with the yardstick: the
same optimizer on whole layers in this process, given the same gradients.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import alto_ds
import alto_ds.adaptor
from alto_ds import states
from tests.sharding.harness import AllReduceCounter, Case, NaiveALTO, bare, deviation
from tests.sharding.linear_model import LinearModel, Yardstick
from tests.sharding.pieces import Pieces, assemble, padding_of, pieces_of

STEPS = 20
CLIPPING = 0.5
OPTIMIZER = {"lr": 0.05, "betas": [0.9, 0.9, 0.99], "alpha": -5.0, "weight_decay": 0.1}
E_ADAMW = {"optimizer": "AdamW", "alpha": -5.0, "beta": 0.9, "lr": 0.05, "weight_decay": 0.1}
STATES = (
    states.EXP_AVG_GRAD,
    states.E_EXP_AVG_GRAD,
    states.EXP_AVG,
    states.EXP_AVG_SQ,
)
POISON = (1e30, float("nan"))


@dataclass(frozen=True, kw_only=True)
class ZeroCase(Case):
    """One configuration of DeepSpeed.

    Attributes:
        zero: the JSON's ``zero_optimization``.
        config: further keys of the JSON.
        gas: gradient accumulation steps.
        optimizer: keys that differ from ``OPTIMIZER`` in the optimizer's params.
        optimizer_type: the JSON's optimizer type.
        zero_init: make the model under ``deepspeed.zero.Init``.
        wrapper: name of the class that DeepSpeed must wrap the optimizer in, so that a row tests
            what it says.
        sharded: whether layers must be proven to straddle ranks (with more than one rank).
        known_gradients: whether DeepSpeed gives the optimizer the gradients that it should.
        refused: beginning of the error that all ranks must raise before a weight changes.
    """

    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    gas: int = 1
    optimizer: dict[str, Any] = field(default_factory=dict)
    optimizer_type: str = "ALTO"
    zero_init: bool = False
    wrapper: str = "DeepSpeedZeroOptimizer"
    sharded: bool = True
    known_gradients: bool = True
    refused: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's params in the JSON."""
        return (E_ADAMW if self.optimizer_type == "E" else OPTIMIZER) | self.optimizer

    @property
    def half(self) -> bool:
        """Whether the model trains in bf16 or fp16."""
        return not self.config.keys().isdisjoint(("bf16", "fp16"))

    @property
    def state_bytes(self) -> int:
        """ALTO's states in bytes a parameter: LAMB has no s, and "bf16" halves s and m."""
        return 8 if self.settings["alpha"] == 0 or "state_dtype" in self.settings else 12

    def json(self, world_size: int) -> dict[str, Any]:
        """The DeepSpeed configuration for ``world_size`` ranks."""
        batch = self.batch(world_size)
        return {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch // self.gas // world_size,
            "optimizer": {"type": self.optimizer_type, "params": self.settings},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {
                    "warmup_num_steps": 3,
                    "total_num_steps": STEPS,
                    "warmup_max_lr": [0.05, 0.01, 0.05],  # one a group
                },
            },
            "gradient_clipping": CLIPPING,
            "steps_per_print": 10**9,
            "zero_optimization": self.zero,
        } | copy.deepcopy(self.config)

    @staticmethod
    def batch(world_size: int) -> int:
        """Global batch size; a power of two where that divides, for exact averages."""
        return 48 if world_size == 3 else 64


@contextlib.contextmanager
def engine_of(case: ZeroCase) -> Iterator[Any]:
    """A DeepSpeed engine for the case, which gives its memory back at the end."""
    config = case.json(dist.get_world_size())
    if case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = LinearModel()
    else:
        model = LinearModel()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.groups(), config=config)
    try:
        yield engine
    finally:
        engine.destroy()


def train_step(engine: Any, case: ZeroCase, step: int) -> None:
    """One optimizer step on the global batch number ``step``."""
    batch = case.batch(dist.get_world_size())
    micro = batch // case.gas // dist.get_world_size()
    for accumulated in range(case.gas):
        first = step * batch + (accumulated * dist.get_world_size() + dist.get_rank()) * micro
        engine.backward(engine(range(first, first + micro)))
        engine.step()


class Recorder:
    """Keeps each gradient that the optimizer receives, and poisons all padding before each step.

    The padding of gradients is put back after the step, for DeepSpeed goes on with some of it.
    The naive twin gets no poison: it must be wrong without it.
    """

    def __init__(self, optimizer: Any, pieces: Pieces) -> None:
        self.grads: dict[Tensor, list[Tensor]] = {}  # of each tensor, flat, one a step
        self.padding = 0  # most elements of padding in a tensor
        self._pieces = pieces
        self._grad_padding: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                self.grads.setdefault(tensor, []).append(tensor.grad.flatten().clone())
                padding = padding_of(tensor, self._pieces[tensor])
                self.padding = max(self.padding, int(padding.sum()))
                if padding.any() and not isinstance(optimizer, NaiveALTO):
                    self._grad_padding[tensor] = tensor.grad[padding].clone()
                    state = optimizer.state[tensor]
                    poisoned = [tensor.data, tensor.grad, *(state[k] for k in STATES if k in state)]
                    for number, victim in enumerate(poisoned, len(self.grads[tensor])):
                        victim[padding] = POISON[number % 2]

    def _after(self, *_: Any) -> None:
        for tensor, padding in self._grad_padding.items():
            assert tensor.grad is not None
            tensor.grad[padding_of(tensor, self._pieces[tensor])] = padding
        self._grad_padding.clear()


def run_exact(case: ZeroCase, _: Path) -> dict[str, Any]:
    """Train, let the yardstick take the same steps, and compare all that they hold."""
    with engine_of(case) as engine:
        optimizer = bare(engine)
        pieces = pieces_of(engine, optimizer)
        initial = {tensor: tensor.detach().flatten().clone() for tensor in pieces}
        counter = AllReduceCounter(optimizer)
        recorder = Recorder(optimizer, pieces)
        rates = []
        for step in range(STEPS):
            rates.append([group["lr"] for group in optimizer.param_groups])
            train_step(engine, case, step)
        values = {"initial": initial, "masters": {t: t.detach().flatten() for t in pieces}}
        values["grads"] = {t: torch.stack(grads) for t, grads in recorder.grads.items()}
        for key in STATES:
            held = {tensor: optimizer.state[tensor].get(key) for tensor in pieces}
            values[key] = {t: value.flatten() for t, value in held.items() if value is not None}
        result = {
            "wrapper": type(engine.optimizer).__name__,
            "sent": counter.calls,
            "padding": recorder.padding,
            **shares(pieces, optimizer),
            **differences(case, assemble(values, pieces, case.sharded), rates),
        }
        if isinstance(optimizer, alto_ds.ALTO):
            result["ratios"] = optimizer.trust_ratios(engine.module.named_parameters())
        return result


def differences(
    case: ZeroCase, found: Mapping[str, Mapping[str, Tensor]], rates: list[list[float]]
) -> dict[str, Any]:
    """Largest deviations from the yardstick, which starts and is given gradients as found.

    Args:
        case: what was trained.
        found: layers by their names for "initial", "masters" and each state; "grads" are
            ``[steps, *shape]``.
        rates: at each step the learning rate of each group.
    """
    make = alto_ds.adaptor.from_config if case.optimizer_type == "E" else alto_ds.ALTO
    initial = dict(found["initial"])
    yardstick = Yardstick(initial, functools.partial(make, **case.settings))
    batch = case.batch(dist.get_world_size())
    gradient_error = 0.0
    for step, rate in enumerate(rates):
        grads = {name: value[step] for name, value in found["grads"].items()}
        samples = range(step * batch, (step + 1) * batch)
        expected = LinearModel.clipped_gradients(samples, CLIPPING)
        gradient_error = max(gradient_error, deviation(grads, {n: expected[n] for n in grads}))
        yardstick.step(grads, rate)
    masters = yardstick.masters()
    result: dict[str, Any] = {
        "gradients": gradient_error,
        "moved": deviation(masters, initial),
        "masters": deviation(found["masters"], masters),
        "states": {key: deviation(found[key], yardstick.states(key)) for key in STATES},
        "weights": {n: p.double().flatten()[:50].tolist() for n, p in found["masters"].items()},
    }
    if case.optimizer_type != "E":
        result["right_ratios"] = yardstick.optimizer.trust_ratios()
    return result


def shares(pieces: Pieces, optimizer: Any) -> dict[str, Any]:
    """Which layers this rank has parts of, and how much it holds."""
    sizes = {name: torch.Size(shape).numel() for name, shape in LinearModel.SHAPES.items()}
    parts = [part for parts in pieces.values() for part in parts]
    return {
        "parameters": sum(size for name, size in sizes.items() if name != "frozen"),
        "straddling": [p.name for p in parts if 0 < p.length < sizes[p.name]],
        "padding_only": any(all(p.length == 0 for p in parts) for parts in pieces.values()),
        "owned": sum(tensor.numel() for tensor in pieces),
        "state_bytes": sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ),
    }


def snapshot(optimizer: Any, pieces: Pieces) -> list[Tensor]:
    """Copies of the layers' parts in weights and states, and the numbers of steps."""
    values = []
    for tensor, parts in pieces.items():
        state = optimizer.state[tensor]
        tensors = [value for _, value in sorted(state.items()) if torch.is_tensor(value)]
        flats = [tensor, *(value for value in tensors if value.shape == tensor.shape)]
        for flat in flats:
            values += [flat.flatten()[p.offset : p.offset + p.length] for p in parts]
        values.append(torch.as_tensor(state.get(states.STEP, 0)))
    return [value.detach().clone() for value in values]


def changes(left: list[Tensor], right: list[Tensor]) -> int:
    """How many of the tensors differ in a bit."""
    return sum(not torch.equal(a, b) for a, b in zip(left, right, strict=True))


def run_resume(case: ZeroCase, folder: Path) -> dict[str, Any]:
    """Save, train on, load, and train on again: both ways on must be the same to the bit."""
    name = next(name for name, candidate in CASES.items() if candidate is case)
    with engine_of(case) as engine:
        for step in range(3):
            train_step(engine, case, step)
        engine.save_checkpoint(str(folder / name))
        for step in range(3, 6):
            train_step(engine, case, step)
        straight = snapshot(bare(engine), pieces_of(engine, bare(engine)))
    with engine_of(case) as engine:  # anew, as another process would
        engine.load_checkpoint(str(folder / name))
        for step in range(3, 6):
            train_step(engine, case, step)
        resumed = snapshot(bare(engine), pieces_of(engine, bare(engine)))
        return {
            "wrapper": type(engine.optimizer).__name__,
            "changed_by_resuming": changes(straight, resumed),
            "tensors": len(straight),
        }


def run_overflow(case: ZeroCase, _: Path) -> dict[str, Any]:
    """Skip a step by an overflow on the last rank only; compare masters and states around it."""
    with engine_of(case) as engine:
        optimizer = bare(engine)
        pieces = pieces_of(engine, optimizer)
        for step in range(3):
            train_step(engine, case, step)
        before = snapshot(optimizer, pieces)
        engine.module.overflows = dist.get_rank() == dist.get_world_size() - 1
        train_step(engine, case, 3)
        skipped = snapshot(optimizer, pieces)
        engine.module.overflows = False
        train_step(engine, case, 4)
        return {
            "wrapper": type(engine.optimizer).__name__,
            "changed_by_skipped": changes(before, skipped),
            "changed_by_next": changes(skipped, snapshot(optimizer, pieces)),
            "skipped_steps": engine.skipped_steps,
        }


def run_refused(case: ZeroCase, _: Path) -> dict[str, Any]:
    """The error when the engine is made, in a backward pass or at a step; did weights change?"""
    result: dict[str, Any] = {"message": "none", "changed": 0}
    try:
        with engine_of(case) as engine:
            tensors = [tensor for group in bare(engine).param_groups for tensor in group["params"]]
            tensors += engine.module.parameters()  # ZenFlow changes these first
            before = [tensor.detach().clone() for tensor in tensors]
            try:
                for step in range(3):  # ZenFlow does not step the optimizer at once
                    train_step(engine, case, step)
            finally:
                result["changed"] = changes(before, tensors)
    except RuntimeError as error:
        result["message"] = str(error)
    return result


def run_misled(case: ZeroCase, _: Path) -> dict[str, Any]:
    """As Megatron-DeepSpeed chooses what decays, which finds all shapes one-dimensional here."""
    config = case.json(dist.get_world_size())
    del config["scheduler"]
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = LinearModel()
    undecayed = [param for param in model.parameters() if len(param.shape) == 1]
    engine, *_others = deepspeed.initialize(
        model=model, model_parameters=[{"params": undecayed, "wd_mult": 0.0}], config=config
    )
    for group in bare(engine).param_groups:  # what its scheduler does
        group["weight_decay"] *= group["wd_mult"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_step(engine, case, 0)
    ratios = bare(engine).trust_ratios(model.named_parameters())
    engine.destroy()
    return {
        "undecayed": len(undecayed),
        "scaled": {name: row.scaled for name, row in ratios.items()},
        "ratios": {name: row.ratio for name, row in ratios.items()},
        "warnings": [str(w.message) for w in caught if "no parameter group" in str(w.message)],
    }


BF16 = {"bf16": {"enabled": True}}
BF16_ACCUMULATED_IN_BF16 = BF16 | {"data_types": {"grad_accum_dtype": "bf16"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
BF16_MASTERS = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
}
BF16_STATES = {"state_dtype": "bf16"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ZERO1, ZERO2 = {"stage": 1}, {"stage": 2}
# The default of DeepSpeed keeps small parameters whole on every rank while training; shards of
# the optimizer are cut all the same, but 0 exercises the gathering too.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
BF16_OPTIMIZER: dict[str, Any] = {
    "zero": ZERO1,
    "config": BF16 | {"data_types": {"grad_accum_dtype": "fp32"}},
    "wrapper": "BF16_Optimizer",
}
STAGE3 = "DeepSpeedZeroOptimizer_Stage3"
UNFUSED = "FP16_UnfusedOptimizer"

# All rows run on 2 ranks and on 3, whose parts are uneven. Those that differ in how layers are cut
# run on 4 too, and some on 1, which cuts nothing.
EXACT: dict[str, Any] = {"measures": run_exact, "worlds": (2, 3)}
LAYOUT = EXACT | {"worlds": (2, 3, 4)}
EVERYWHERE = EXACT | {"worlds": (1, 2, 3, 4)}
OVERFLOW: dict[str, Any] = {"measures": run_overflow, "worlds": (2,), "config": FP16}
RESUME: dict[str, Any] = {"measures": run_resume, "worlds": (2,)}
REFUSED: dict[str, Any] = {"measures": run_refused, "worlds": (2,)}

CASES: dict[str, ZeroCase] = {
    "zero0-fp32": ZeroCase(**EVERYWHERE, wrapper="ALTO", sharded=False),
    "zero0-bf16": ZeroCase(**EXACT, config=BF16, wrapper=UNFUSED, sharded=False),
    # DeepSpeed 0.19.8 divides by the loss scale here but never multiplied by it: what arrives is
    # right but for that factor.
    "zero0-fp16": ZeroCase(
        **EXACT, config=FP16, wrapper=UNFUSED, sharded=False, known_gradients=False
    ),
    "zero1-fp32": ZeroCase(**LAYOUT, zero=ZERO1),
    "zero1-bf16": ZeroCase(**EXACT, zero=ZERO1, config=BF16_ACCUMULATED_IN_BF16),
    "zero1-bf16-fp32-accumulation": ZeroCase(**EVERYWHERE, **BF16_OPTIMIZER, gas=4),
    "zero1-fp16": ZeroCase(**EXACT, zero=ZERO1, config=FP16),
    "zero1-offload": ZeroCase(**EXACT, zero=ZERO1 | OFFLOAD),
    "zero2-fp32": ZeroCase(**EVERYWHERE, zero=ZERO2),
    "zero2-fp32-gas4": ZeroCase(**EVERYWHERE, zero=ZERO2, gas=4),
    "zero2-bf16": ZeroCase(**EXACT, zero=ZERO2, config=BF16),
    "zero2-fp16": ZeroCase(**EXACT, zero=ZERO2, config=FP16, gas=4),
    "zero2-round-robin": ZeroCase(**LAYOUT, zero=ZERO2 | {"round_robin_gradients": True}),
    "zero2-offload": ZeroCase(**EXACT, zero=ZERO2 | OFFLOAD, gas=4),
    "zero2-offload-bf16": ZeroCase(**LAYOUT, zero=ZERO2 | OFFLOAD, config=BF16),
    "zero2-lamb": ZeroCase(**EVERYWHERE, zero=ZERO2, optimizer={"alpha": 0.0}),
    "zero2-vanilla": ZeroCase(
        **EXACT,
        zero=ZERO2,
        optimizer={"bias_correction": False, "trust_clip": [0.5, 2.0], "eps": 1e-8},
    ),
    "zero2-small-batch": ZeroCase(
        **EXACT, zero=ZERO2, optimizer={"alpha": 0.5, "betas": [0.01, 0.9, 0.99]}
    ),
    "zero3-fp32": ZeroCase(**EVERYWHERE, zero=ZERO3, wrapper=STAGE3),
    "zero3-persistent": ZeroCase(**EXACT, zero={"stage": 3}, wrapper=STAGE3),
    "zero3-fp32-gas4": ZeroCase(**EVERYWHERE, zero=ZERO3, gas=4, wrapper=STAGE3),
    "zero3-bf16": ZeroCase(**EXACT, zero=ZERO3, config=BF16, wrapper=STAGE3),
    "zero3-fp16": ZeroCase(**EXACT, zero=ZERO3, config=FP16, wrapper=STAGE3),
    "zero3-init": ZeroCase(**LAYOUT, zero=ZERO3, config=BF16, zero_init=True, wrapper=STAGE3),
    "zero3-sub-groups": ZeroCase(**LAYOUT, zero=ZERO3 | {"sub_group_size": 100}, wrapper=STAGE3),
    "zero3-offload": ZeroCase(**LAYOUT, zero=ZERO3 | OFFLOAD, gas=4, wrapper=STAGE3),
    # ZeRO++: weights are whole in each group of 2 ranks, states are cut over all 4.
    "zero3-hpz": ZeroCase(
        measures=run_exact, zero=ZERO3 | {"zero_hpz_partition_size": 2}, config=BF16, wrapper=STAGE3
    ),
    "zero3-lamb": ZeroCase(**EXACT, zero=ZERO3, optimizer={"alpha": 0.0}, wrapper=STAGE3),
    "zero0-bf16-states": ZeroCase(
        **EXACT, config=BF16, optimizer=BF16_STATES, wrapper=UNFUSED, sharded=False
    ),
    "zero1-bf16-states": ZeroCase(**EXACT, **BF16_OPTIMIZER, optimizer=BF16_STATES),
    "zero2-bf16-states": ZeroCase(
        **EVERYWHERE, zero=ZERO2 | OFFLOAD, config=BF16, optimizer=BF16_STATES
    ),
    "zero3-bf16-states": ZeroCase(**LAYOUT, zero=ZERO3, optimizer=BF16_STATES, wrapper=STAGE3),
    "zero1-bf16-masters": ZeroCase(**EXACT, zero=ZERO1, config=BF16_MASTERS),
    "zero2-bf16-masters": ZeroCase(**EXACT, zero=ZERO2, config=BF16_MASTERS, optimizer=BF16_STATES),
    "zero3-bf16-masters": ZeroCase(
        **EXACT, zero=ZERO3, config=BF16_MASTERS, optimizer=BF16_STATES, wrapper=STAGE3
    ),
    "e-zero0-fp32": ZeroCase(**EXACT, optimizer_type="E", wrapper="E", sharded=False),
    "e-zero1-bf16-fp32-accumulation": ZeroCase(**EXACT, **BF16_OPTIMIZER, optimizer_type="E"),
    "e-zero2-bf16": ZeroCase(**EXACT, zero=ZERO2, config=BF16, optimizer_type="E"),
    "e-zero3-fp32": ZeroCase(**EXACT, zero=ZERO3, optimizer_type="E", wrapper=STAGE3),
    **{
        f"e-{base.lower()}-zero{zero['stage']}": ZeroCase(
            measures=run_exact,
            zero=zero,
            optimizer={"optimizer": base} | settings,
            optimizer_type="E",
            wrapper=wrapper,
            worlds=(2,),
        )
        for zero, wrapper in ((ZERO2, "DeepSpeedZeroOptimizer"), (ZERO3, STAGE3))
        for base, settings in (
            ("SGD", {"momentum": 0.9}),
            ("Adagrad", {}),
            ("RMSprop", {"momentum": 0.5}),
            ("ALTO", {"weight_decay": 0.1}),
        )
    },
    **{
        f"naive-zero{zero['stage']}": ZeroCase(
            measures=run_exact,
            zero=zero,
            optimizer_type="NaiveALTO",
            wrapper=wrapper,
            worlds=(1, 2),
        )
        for zero, wrapper in (
            (ZERO1, "DeepSpeedZeroOptimizer"),
            (ZERO2, "DeepSpeedZeroOptimizer"),
            (ZERO3, STAGE3),
        )
    },
    "overflow-zero0": ZeroCase(**OVERFLOW, wrapper=UNFUSED),
    "overflow-zero1": ZeroCase(**OVERFLOW, zero=ZERO1),
    "overflow-zero2": ZeroCase(**OVERFLOW, zero=ZERO2),
    "overflow-zero3": ZeroCase(**OVERFLOW, zero=ZERO3, wrapper=STAGE3),
    "resume-zero0-fp32": ZeroCase(**RESUME, wrapper="ALTO"),
    "resume-zero0-bf16": ZeroCase(**RESUME, config=BF16, wrapper=UNFUSED),
    "resume-zero1": ZeroCase(**RESUME, **BF16_OPTIMIZER),
    "resume-zero2": ZeroCase(**RESUME, zero=ZERO2, config=FP16),
    "resume-zero3": ZeroCase(**RESUME, zero=ZERO3, config=BF16, wrapper=STAGE3),
    "resume-zero0-bf16-states": ZeroCase(
        **RESUME, config=BF16, optimizer=BF16_STATES, wrapper=UNFUSED
    ),
    "resume-zero1-bf16-states": ZeroCase(**RESUME, **BF16_OPTIMIZER, optimizer=BF16_STATES),
    "resume-zero2-bf16-states": ZeroCase(**RESUME, zero=ZERO2, optimizer=BF16_STATES),
    "resume-zero3-bf16-states": ZeroCase(
        **RESUME, zero=ZERO3, optimizer=BF16_STATES, wrapper=STAGE3
    ),
    "resume-e-zero2": ZeroCase(**RESUME, zero=ZERO2, optimizer_type="E"),
    "resume-e-adagrad-zero2": ZeroCase(
        **RESUME, zero=ZERO2, optimizer={"optimizer": "Adagrad"}, optimizer_type="E"
    ),
    **{
        f"refused-e-adafactor-zero{zero['stage']}": ZeroCase(
            **REFUSED,
            zero=zero,
            optimizer={"optimizer": "Adafactor"},
            optimizer_type="E",
            refused="E: the base optimizer Adafactor is not known to treat each element by itself",
        )
        for zero in (ZERO1, ZERO2, ZERO3)
    },
    "misled-by-zero-init": ZeroCase(
        measures=run_misled, worlds=(2,), zero=ZERO3, config=BF16, wrapper=STAGE3
    ),
    # The optimizer's own settings are left out, for ZenFlow's AdamW would stop at them.
    **{
        f"refused-zenflow-{optimizer.lower()}{'-overlap' if overlap else ''}": ZeroCase(
            **REFUSED,
            zero={
                "stage": 2,
                "overlap_comm": True,
                "zenflow": {
                    "topk_ratio": 0.1,
                    "update_interval": 2,
                    "full_warm_up_rounds": 0,
                    "overlap_step": overlap,
                },
            }
            | OFFLOAD,
            config=BF16 | {"optimizer": {"type": optimizer, "params": {"lr": 0.05}}},
            refused=f"{optimizer} cannot be used with ZenFlow",
        )
        for optimizer in ("ALTO", "E")
        for overlap in (False, True)
    },
    # Last, for DeepSpeed never forgets torch_autocast.
    **{
        f"refused-autocast-{optimizer.lower()}-zero{zero['stage']}": ZeroCase(
            **REFUSED,
            zero=zero,
            config={"torch_autocast": {"enabled": True, "dtype": "float16"}},
            optimizer_type=optimizer,
            refused=f"{optimizer} cannot be stepped by a torch.amp.GradScaler where ranks share",
        )
        for optimizer in ("ALTO", "E")
        for zero in (ZERO1, ZERO2, ZERO3)
    },
}
