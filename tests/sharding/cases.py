"""The rows of the sharding matrix: what is trained under which DeepSpeed configuration."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from alto_ds import ALTO
from alto_ds.layout import Fragment, Layout

STEPS = 20
CLIPPING = 0.5
OPTIMIZER = {"lr": 0.05, "betas": [0.9, 0.9, 0.99], "alpha": -5.0, "weight_decay": 0.1}
E_ADAMW = {"optimizer": "AdamW", "alpha": -5.0, "beta": 0.9, "lr": 0.05, "weight_decay": 0.1}


class NaiveALTO(ALTO):
    """What any layer-wise optimizer does that does not know ZeRO: a flat tensor is one layer."""

    def _shards(self) -> Any:
        return [
            shard._replace(layout=Layout(shard.layout.layers[:1], (_everything(shard.tensor),)))
            for shard in super()._shards()
        ]

    def _only_allocates(self, shards: Any) -> bool:
        return False


def _everything(tensor: Any) -> Fragment:
    return Fragment(layer=0, start=0, length=tensor.numel(), offset=0)


@dataclass(frozen=True, kw_only=True)
class Case:
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
        refused: beginning of the error that the optimizer's first step must raise on all ranks.
        worlds: numbers of ranks to run on.
    """

    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    gas: int = 1
    optimizer: dict[str, Any] = field(default_factory=dict)
    optimizer_type: str = "ALTO"
    zero_init: bool = False
    wrapper: str = "DeepSpeedZeroOptimizer"
    sharded: bool = True
    refused: str = ""
    worlds: tuple[int, ...] = (2, 3, 4)

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's params in the JSON."""
        return (E_ADAMW if self.optimizer_type == "E" else OPTIMIZER) | self.optimizer

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


ALL_WORLDS = (1, 2, 3, 4)
BF16 = {"bf16": {"enabled": True}}
BF16_ACCUMULATED_IN_BF16 = BF16 | {"data_types": {"grad_accum_dtype": "bf16"}}
BF16_ACCUMULATED_IN_FP32 = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
BF16_STATES = {"state_dtype": "bf16"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# The default of DeepSpeed keeps small parameters whole on every rank while training; shards of
# the optimizer are cut all the same, but 0 exercises the gathering too.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
STAGE3 = "DeepSpeedZeroOptimizer_Stage3"

CASES: dict[str, Case] = {
    "zero0-fp32": Case(wrapper="ALTO", sharded=False, worlds=ALL_WORLDS),
    "zero0-bf16": Case(config=BF16, wrapper="FP16_UnfusedOptimizer", sharded=False),
    "zero0-fp16": Case(config=FP16, wrapper="FP16_UnfusedOptimizer", sharded=False),
    "zero1-fp32": Case(zero={"stage": 1}),
    "zero1-bf16": Case(zero={"stage": 1}, config=BF16_ACCUMULATED_IN_BF16),
    "zero1-bf16-fp32-accumulation": Case(
        zero={"stage": 1},
        config=BF16_ACCUMULATED_IN_FP32,
        gas=4,
        wrapper="BF16_Optimizer",
        worlds=ALL_WORLDS,
    ),
    "zero1-fp16": Case(zero={"stage": 1}, config=FP16),
    "zero1-offload": Case(zero={"stage": 1} | OFFLOAD),
    "zero2-fp32": Case(zero={"stage": 2}, worlds=ALL_WORLDS),
    "zero2-fp32-gas4": Case(zero={"stage": 2}, gas=4, worlds=ALL_WORLDS),
    "zero2-bf16": Case(zero={"stage": 2}, config=BF16),
    "zero2-fp16": Case(zero={"stage": 2}, config=FP16, gas=4),
    "zero2-round-robin": Case(zero={"stage": 2, "round_robin_gradients": True}),
    "zero2-offload": Case(zero={"stage": 2} | OFFLOAD, gas=4),
    "zero2-offload-bf16": Case(zero={"stage": 2} | OFFLOAD, config=BF16),
    "zero2-lamb": Case(zero={"stage": 2}, optimizer={"alpha": 0.0}, worlds=ALL_WORLDS),
    "zero2-vanilla": Case(
        zero={"stage": 2},
        optimizer={"bias_correction": False, "trust_clip": [0.5, 2.0], "eps": 1e-8},
    ),
    "zero2-small-batch": Case(
        zero={"stage": 2}, optimizer={"alpha": 0.5, "betas": [0.01, 0.9, 0.99]}
    ),
    "zero3-fp32": Case(zero=ZERO3, wrapper=STAGE3, worlds=ALL_WORLDS),
    "zero3-persistent": Case(zero={"stage": 3}, wrapper=STAGE3),
    "zero3-fp32-gas4": Case(zero=ZERO3, gas=4, wrapper=STAGE3, worlds=ALL_WORLDS),
    "zero3-bf16": Case(zero=ZERO3, config=BF16, wrapper=STAGE3),
    "zero3-fp16": Case(zero=ZERO3, config=FP16, wrapper=STAGE3),
    "zero3-init": Case(zero=ZERO3, config=BF16, zero_init=True, wrapper=STAGE3),
    "zero3-sub-groups": Case(zero=ZERO3 | {"sub_group_size": 100}, wrapper=STAGE3),
    "zero3-offload": Case(zero=ZERO3 | OFFLOAD, gas=4, wrapper=STAGE3),
    # ZeRO++: weights are whole in each group of 2 ranks, states are cut over all 4.
    "zero3-hpz": Case(
        zero=ZERO3 | {"zero_hpz_partition_size": 2}, config=BF16, wrapper=STAGE3, worlds=(4,)
    ),
    "zero3-lamb": Case(zero=ZERO3, optimizer={"alpha": 0.0}, wrapper=STAGE3),
    "zero0-bf16-states": Case(
        config=BF16,
        optimizer=BF16_STATES,
        wrapper="FP16_UnfusedOptimizer",
        sharded=False,
        worlds=(2, 4),
    ),
    "zero1-bf16-states": Case(
        zero={"stage": 1},
        config=BF16_ACCUMULATED_IN_FP32,
        optimizer=BF16_STATES,
        wrapper="BF16_Optimizer",
        worlds=(2, 4),
    ),
    "zero2-bf16-states": Case(
        zero={"stage": 2} | OFFLOAD, config=BF16, optimizer=BF16_STATES, worlds=ALL_WORLDS
    ),
    "zero3-bf16-states": Case(zero=ZERO3, optimizer=BF16_STATES, wrapper=STAGE3, worlds=(2, 4)),
    "overflow-zero0": Case(config=FP16, wrapper="FP16_UnfusedOptimizer", worlds=(2,)),
    "overflow-zero1": Case(zero={"stage": 1}, config=FP16, worlds=(2,)),
    "overflow-zero2": Case(zero={"stage": 2}, config=FP16, worlds=(2,)),
    "overflow-zero3": Case(zero=ZERO3, config=FP16, wrapper=STAGE3, worlds=(2,)),
    "resume-zero0-fp32": Case(wrapper="ALTO", worlds=(2,)),
    "resume-zero0-bf16": Case(config=BF16, wrapper="FP16_UnfusedOptimizer", worlds=(2,)),
    "resume-zero1": Case(
        zero={"stage": 1},
        config=BF16_ACCUMULATED_IN_FP32,
        wrapper="BF16_Optimizer",
        worlds=(2,),
    ),
    "resume-zero2": Case(zero={"stage": 2}, config=FP16, worlds=(2,)),
    "resume-zero0-bf16-states": Case(
        config=BF16, optimizer=BF16_STATES, wrapper="FP16_UnfusedOptimizer", worlds=(2,)
    ),
    "resume-zero1-bf16-states": Case(
        zero={"stage": 1},
        config=BF16_ACCUMULATED_IN_FP32,
        optimizer=BF16_STATES,
        wrapper="BF16_Optimizer",
        worlds=(2,),
    ),
    "resume-zero2-bf16-states": Case(zero={"stage": 2}, optimizer=BF16_STATES, worlds=(2,)),
    "resume-zero3-bf16-states": Case(
        zero=ZERO3, optimizer=BF16_STATES, wrapper=STAGE3, worlds=(2,)
    ),
    "resume-zero3": Case(zero=ZERO3, config=BF16, wrapper=STAGE3, worlds=(2,)),
    "resume-e-zero2": Case(zero={"stage": 2}, optimizer_type="E", worlds=(2,)),
    "resume-e-adagrad-zero2": Case(
        zero={"stage": 2}, optimizer={"optimizer": "Adagrad"}, optimizer_type="E", worlds=(2,)
    ),
    "ddp": Case(sharded=False, worlds=(2,)),  # where averages are exact
    "e-zero0-fp32": Case(optimizer_type="E", wrapper="E", sharded=False),
    "e-zero1-bf16-fp32-accumulation": Case(
        zero={"stage": 1},
        config=BF16_ACCUMULATED_IN_FP32,
        optimizer_type="E",
        wrapper="BF16_Optimizer",
    ),
    "e-zero2-bf16": Case(zero={"stage": 2}, config=BF16, optimizer_type="E"),
    "e-zero3-fp32": Case(zero=ZERO3, optimizer_type="E", wrapper=STAGE3),
    **{
        f"e-{base.lower()}-zero{stage}": Case(
            zero=zero | {"stage": stage},
            optimizer={"optimizer": base} | settings,
            optimizer_type="E",
            wrapper=wrapper,
            worlds=(2,),
        )
        for stage, zero, wrapper in (
            (2, {}, "DeepSpeedZeroOptimizer"),
            (3, ZERO3, STAGE3),
        )
        for base, settings in (
            ("SGD", {"momentum": 0.9}),
            ("Adagrad", {}),
            ("RMSprop", {"momentum": 0.5}),
            ("ALTO", {"weight_decay": 0.1}),
        )
    },
    "naive-zero1": Case(zero={"stage": 1}, optimizer_type="NaiveALTO", worlds=(1, 2)),
    "naive-zero2": Case(zero={"stage": 2}, optimizer_type="NaiveALTO", worlds=(1, 2)),
    "naive-zero3": Case(zero=ZERO3, optimizer_type="NaiveALTO", wrapper=STAGE3, worlds=(1, 2)),
    **{
        f"refused-e-adafactor-zero{stage}": Case(
            zero=zero | {"stage": stage},
            optimizer={"optimizer": "Adafactor"},
            optimizer_type="E",
            refused="E: the base optimizer Adafactor is not known to treat each element by itself",
            worlds=(2,),
        )
        for stage, zero in ((1, {}), (2, {}), (3, ZERO3))
    },
    # The optimizer's own settings are left out, for ZenFlow's AdamW would stop at them.
    **{
        f"refused-zenflow-{optimizer.lower()}{'-overlap' if overlap else ''}": Case(
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
            worlds=(2,),
        )
        for optimizer in ("ALTO", "E")
        for overlap in (False, True)
    },
    # Last, for DeepSpeed never forgets torch_autocast.
    **{
        f"refused-autocast-{optimizer.lower()}-zero{stage}": Case(
            zero=zero | {"stage": stage},
            config={"torch_autocast": {"enabled": True, "dtype": "float16"}},
            optimizer_type=optimizer,
            refused=f"{optimizer} cannot be stepped by a torch.amp.GradScaler where ranks share",
            worlds=(2,),
        )
        for optimizer in ("ALTO", "E")
        for stage, zero in ((1, {}), (2, {}), (3, ZERO3))
    },
}
