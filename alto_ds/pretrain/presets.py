"""With which settings is GPT-2 pre-trained? The table from which ``configs/`` is written.

The paper's run (Zhao et al., 2025: GPT-2 345M at a global batch of 4,096 sequences, 5,000 steps)
gives the numbers. Others follow from it by two rules:

- A run sees as many sequences as the paper's, 5,000 · 4,096, whatever its batch.
- The learning rate grows with the square root of the batch, and the number of warm-up steps stays,
  as in LAMB's paper (You et al., 2020): there a doubled batch has half the steps, and twice the
  share of them in the warm-up.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from alto_ds.settings import by_batch_size

BATCH_SIZE, STEPS, WARM_UP = 4096, 5000, 100
LARGEST_BATCH_SIZE = 65536
# Learning rates at a batch of 4,096: the paper's best for each optimizer.
OPTIMIZERS = {"alto": 1e-2, "lamb": 1e-2, "adam": 6e-4, "adamw": 8e-4}
# Sequences of 1,024 tokens in a micro batch: 345M as in the paper. Activations then take 3 to 7 GB,
# by 34 bytes a token, block and hidden unit in bf16 (Korthikanti et al., 2022, without attention
# matrices).
MICRO_BATCH_SIZES = {"gpt2": 16, "gpt2-medium": 4, "gpt2-large": 4, "gpt2-xl": 2}
WITH_OFFLOAD = ("gpt2-large", "gpt2-xl")
BATCH_SIZES = (1024, 4096, 16384)
STAGES = (1, 2, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """What a configuration is made of.

    Attributes:
        model: a name of :data:`MICRO_BATCH_SIZES`.
        zero: stage of ZeRO.
        batch_size: sequences of a step, on all ranks.
        offload: keep optimizer states and master weights in the host's memory; ZeRO-3 only.
        optimizer: a name of :data:`OPTIMIZERS`.
        micro_batch_size: sequences of a rank in a micro step; None for that of the model.

    Raises:
        ValueError: names the value that is out of its range.
    """

    model: str
    zero: int = 1
    batch_size: int = BATCH_SIZE
    offload: bool = False
    optimizer: str = "alto"
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.model not in MICRO_BATCH_SIZES:
            raise ValueError(
                f"{self.model}: the model must be one of {', '.join(MICRO_BATCH_SIZES)}"
            )
        if self.zero not in (0, *STAGES):
            raise ValueError(f"--zero={self.zero} must be 0, 1, 2 or 3")
        if self.offload and self.zero != 3:
            raise ValueError(f"--offload needs --zero=3, not {self.zero}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer={self.optimizer} must be one of {', '.join(OPTIMIZERS)}")
        if not 1 <= self.batch_size <= LARGEST_BATCH_SIZE:
            raise ValueError(f"--batch={self.batch_size} must be from 1 to {LARGEST_BATCH_SIZE}")
        if self.micro < 1 or self.batch_size % self.micro:
            raise ValueError(
                f"--batch={self.batch_size} must be a multiple of --micro_batch={self.micro}, the "
                "sequences of a rank in a micro step"
            )

    @property
    def micro(self) -> int:
        """Sequences of a rank in a micro step."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return min(MICRO_BATCH_SIZES[self.model], self.batch_size)

    @property
    def lr(self) -> float:
        """Learning rate after the warm-up, rounded to 3 digits."""
        lr = OPTIMIZERS[self.optimizer] * math.sqrt(self.batch_size / BATCH_SIZE)
        return float(f"{lr:.3g}")

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return max(round(BATCH_SIZE * STEPS / self.batch_size), 1)

    @property
    def file(self) -> Path:
        """Its name in ``configs/``."""
        offload = "_offload" if self.offload else ""
        return Path(self.model, f"zero{self.zero}{offload}_batch{self.batch_size}.json")

    def config(self) -> dict[str, Any]:
        """The JSON for DeepSpeed."""
        zero: dict[str, Any] = {"stage": self.zero}
        if self.zero == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return _config(
            batch_size=self.batch_size,
            micro_batch_size=self.micro,
            optimizer=self._optimizer(),
            steps=self.steps,
            warm_up=min(WARM_UP, self.steps // 3),
            others={"bf16": {"enabled": True}, "zero_optimization": zero},
        )

    def _optimizer(self) -> dict[str, Any]:
        lr, decay = {"lr": self.lr}, {"weight_decay": 1e-4}
        if self.optimizer in ("adam", "adamw"):
            kind = {"adam": "Adam", "adamw": "AdamW"}[self.optimizer]
            # DeepSpeed takes "Adam" for AdamW unless it is told not to.
            mode = {"adam_w_mode": False} if self.optimizer == "adam" else {}
            return {"type": kind, "params": lr | {"betas": [0.9, 0.999]} | decay | mode}
        alpha, betas = by_batch_size(self.batch_size)
        if self.optimizer == "lamb":
            alpha = 0.0
        ours = {"betas": [*betas], "alpha": alpha, "eps": [1e-6, 1e-6, 1e-10]}
        return {"type": "ALTO", "params": lr | ours | decay}


def sizes() -> list[Preset]:
    """ALTO for all sizes, stages and batches that ``configs/`` has."""
    return [
        Preset(model=model, zero=stage, offload=offload, batch_size=batch_size)
        for model in MICRO_BATCH_SIZES
        for stage, offload in (*((stage, False) for stage in STAGES), (3, True))
        if not offload or model in WITH_OFFLOAD
        for batch_size in BATCH_SIZES
    ]


def tiny(stage: int) -> dict[str, Any]:
    """The configuration of the demo, for two CPU cores."""
    # With gloo one reduction to all is faster than one to each, and small buffers are used again:
    # together a sixth of a step of GPT-2 124M without accumulation.
    fast_on_cpu = {"reduce_scatter": False, "reduce_bucket_size": 5000000} if stage < 3 else {}
    # The settings of large batches, though this one is small, for that is what it shows.
    params = {"lr": 0.02, "betas": [0.99, 0.9, 0.99], "alpha": -5.0, "weight_decay": 1e-4}
    return _config(
        batch_size=32,
        micro_batch_size=8,
        optimizer={"type": "ALTO", "params": params},
        steps=300,
        warm_up=20,
        others={"zero_optimization": {"stage": stage, **fast_on_cpu}},
    )


def _config(
    *,
    batch_size: int,
    micro_batch_size: int,
    optimizer: dict[str, Any],
    steps: int,
    warm_up: int,
    others: dict[str, Any],
) -> dict[str, Any]:
    return {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "optimizer": optimizer,
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": steps,
                "warmup_num_steps": warm_up,
                "warmup_min_ratio": 0.0,
                "cos_min_ratio": 0.1,
            },
        },
        "gradient_clipping": 1.0,
        **others,
        "steps_per_print": 1000000,
    }


def files() -> dict[Path, dict[str, Any]]:
    """All of ``configs/``: the JSON of each file."""
    found = {Path("gpt2-tiny", f"zero{stage}.json"): tiny(stage) for stage in STAGES}
    for name in OPTIMIZERS:
        preset = Preset(model="gpt2-medium", optimizer=name)
        found[Path("gpt2-medium", f"paper_{name}.json")] = preset.config()
    return found | {preset.file: preset.config() for preset in sizes()}


def as_text(config: dict[str, Any]) -> str:
    """The JSON as it is written, with short lists in one line."""
    text = json.dumps(config, indent=2)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"
