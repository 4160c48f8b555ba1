"""Memory at the peak of GPT-2's loss and its gradient, and the time they take.

A micro batch of 8 sequences of 1,024 tokens, over 50,304 tokens, in float32; each way of computing
the loss in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from alto_ds.pretrain import model as models
from tests.benchmarks.contenders import arguments, timed, write

SEQUENCES, LENGTH, HIDDEN, VOCABULARY = 8, 1024, 768, 50304
Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def of_transformers(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    return ForCausalLMLoss(head(hidden), labels, head.out_features)


def in_parts_of(logits: int, head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    models.LOGITS = logits
    return models.next_token_loss(head, hidden, labels)


WAYS: dict[str, Loss] = {
    "transformers'": of_transformers,
    "all logits at once": partial(in_parts_of, SEQUENCES * LENGTH * VOCABULARY),
    "in parts, as the main job does": partial(in_parts_of, models.LOGITS),
}


def measure(name: str) -> list[dict[str, Any]]:
    """One way, in this process, which must be a fresh one."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(SEQUENCES, LENGTH, HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH))
    before = psutil.Process().memory_info().rss
    losses = []
    seconds = timed(lambda: losses.append(WAYS[name](head, hidden, labels)))
    seconds += timed(lambda: losses[0].backward())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"loss": name, "peak, MiB": (peak - before) / 2**20, "seconds": seconds}
    return [row | {"value": round(losses[0].item(), 6)}]


def main() -> None:
    options = arguments()
    rows: list[dict[str, Any]] = []
    for name in WAYS:
        with tempfile.NamedTemporaryFile("r") as file:
            call = f"loss.write({file.name!r}, loss.measure({name!r}))"
            code = f"from tests.benchmarks import loss; {call}"
            subprocess.run([sys.executable, "-c", code], check=True)
            rows += json.load(file)
    write(options.report, rows)


if __name__ == "__main__":
    main()
