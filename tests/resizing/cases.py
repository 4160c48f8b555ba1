"""Which engines write a checkpoint, and which go on from it?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ALTO = {"lr": 0.05, "betas": [0.9, 0.9, 0.99], "alpha": -5.0, "weight_decay": 0.1}
ADAMW = {"optimizer": "AdamW", "alpha": -5.0, "beta": 0.9, "lr": 0.05, "weight_decay": 0.1}
MOMENTUM = {"optimizer": "SGD", "alpha": -5.0, "beta": 0.9, "lr": 0.05, "momentum": 0.9}
BF16_STATES = ALTO | {"state_dtype": "bf16"}
SAVED, STEPS = 3, 10  # steps before the checkpoint, and after it

FP32: dict[str, Any] = {}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8}}


@dataclass(frozen=True)
class Side:
    """One engine.

    Attributes:
        stage: of ZeRO.
        ranks: number of ranks.
        tensor_parallel: ranks that share each layer.
        precision: keys of DeepSpeed's JSON.
        zero: further keys of ``zero_optimization``.
    """

    stage: int
    ranks: int
    tensor_parallel: int = 1
    precision: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = "bf16-fp32" if "data_types" in self.precision else "".join(self.precision)[:4]
        more = [f"tp{self.tensor_parallel}"] * (self.tensor_parallel > 1) + [kind] * bool(kind)
        return "-".join([f"zero{self.stage}", f"{self.ranks}ranks", *more, *self.zero])


@dataclass(frozen=True)
class Pair:
    """A checkpoint of one engine that another loads.

    Attributes:
        source: writes it, and goes on as the yardstick.
        target: loads it.
        optimizer: the JSON's params.
        kind: the JSON's optimizer type.
        default: whether it runs without ``-m slow``.
    """

    source: Side
    target: Side
    optimizer: dict[str, Any] = field(default_factory=lambda: ALTO)
    kind: str = "ALTO"
    default: bool = False

    @property
    def batch(self) -> int:
        """Samples in a global batch; where gradients are rounded, their means must be exact."""
        return 24 if 3 in (self.source.ranks, self.target.ranks) else 8

    @property
    def source_name(self) -> str:
        """The same for all pairs that share the checkpoint."""
        settings = self.optimizer.get("optimizer", self.optimizer.get("state_dtype", ""))
        alpha = self.optimizer["alpha"]
        model = "-llama" * self.is_llama
        return f"{self.kind}{settings}{alpha}-{self.source}-batch{self.batch}{model}"

    @property
    def is_llama(self) -> bool:
        """Whether a model of transformers is trained, which AutoTP can cut."""
        return max(self.source.tensor_parallel, self.target.tensor_parallel) > 1 or (
            "llama" in self.optimizer
        )

    def __str__(self) -> str:
        return f"{self.source_name}-to-{self.target}"


def _pairs() -> list[Pair]:
    one, two, three, four = ([Side(stage, ranks) for stage in range(4)] for ranks in range(1, 5))
    accumulating = [Side(1, ranks, precision=BF16_OPTIMIZER) for ranks in range(5)]
    half = [Side(3, ranks, precision=BF16) for ranks in range(5)]
    small = {"sub_group_size": 200, "stage3_param_persistence_threshold": 0}
    cut = Side(3, 3, zero=small)
    return [
        Pair(two[1], three[1]),
        Pair(two[1], three[3], default=True),
        Pair(two[2], three[2]),
        Pair(two[2], cut),
        Pair(cut, two[1], default=True),
        Pair(two[3], three[3]),
        Pair(two[3], three[2], default=True),
        Pair(two[3], one[1]),
        Pair(four[3], two[3]),
        Pair(four[1], two[2]),
        Pair(one[2], four[3], default=True),
        Pair(four[2], one[0]),
        Pair(three[3], two[0]),
        Pair(accumulating[2], accumulating[4]),
        Pair(accumulating[2], half[4], default=True),
        Pair(half[4], accumulating[2]),
        Pair(half[2], Side(0, 1, precision=BF16)),
        Pair(half[2], Side(2, 2)),
        Pair(Side(2, 2, precision=FP16), Side(3, 4, precision=FP16)),
        Pair(two[2], four[3], BF16_STATES, default=True),
        Pair(four[3], two[1], BF16_STATES),
        Pair(two[2], three[3], ALTO | {"alpha": 0}),
        Pair(two[3], three[1], ADAMW, "E", default=True),
        Pair(two[2], three[3], ADAMW, "E"),
        Pair(two[2], three[3], MOMENTUM, "E"),
        Pair(Side(1, 2, 2), two[2], default=True),
        Pair(Side(2, 4, 2), two[3]),
        Pair(two[1], Side(1, 4, 2), ALTO | {"llama": True}, default=True),
        Pair(two[3], Side(2, 2, 2), ALTO | {"llama": True}),
    ]


PAIRS = {str(pair): pair for pair in _pairs()}
