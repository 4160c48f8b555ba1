"""The optimizers that are compared, and the shapes of GPT-2's layers."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from alto_ds import ALTO
from alto_ds.layout import Layout, resolve

# Blocks and hidden size; the first is for rehearsals.
SIZES = {"gpt2-tiny": (2, 64), "gpt2": (12, 768), "gpt2-medium": (24, 1024)}


def gpt2_shapes(model: str) -> list[tuple[int, ...]]:
    """Shapes of all parameters: 124M for gpt2, 355M for gpt2-medium ("345M"), 3M for gpt2-tiny."""
    blocks, hidden = SIZES[model]
    norm = [(hidden,), (hidden,)]
    attention = [(hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    mlp = [(hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,)]
    block: list[tuple[int, ...]] = [*norm, *attention, *norm, *mlp]
    return [(50257, hidden), (1024, hidden), *block * blocks, *norm]


def make_params(shapes: Iterable[tuple[int, ...]], device: str = "cpu") -> list[nn.Parameter]:
    """Random parameters with gradients."""
    torch.manual_seed(1234)
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def with_layout(optimizer: ALTO, layout: Layout) -> ALTO:
    """Give the one parameter group of ``optimizer`` a layout that its tensors do not tell."""
    optimizer._layout = lambda group: layout  # type: ignore[method-assign]
    return optimizer


def cut(optimizer: ALTO, params: Sequence[nn.Parameter]) -> ALTO:
    """Let ``optimizer`` take each layer for one that another rank has a part of."""
    layout = resolve(params, params, dict.fromkeys(params, "layer"))
    fragments = tuple(f._replace(whole=False) for f in layout.fragments)
    return with_layout(optimizer, dataclasses.replace(layout, fragments=fragments))


def timm_lamb() -> Any:
    """timm's Lamb, without the rest of timm, which needs torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        raise ImportError("timm is not installed")
    package = types.ModuleType("timm_optim")
    package.__path__ = [str(Path(found.origin).parent / "optim")]
    sys.modules["timm_optim"] = package
    return importlib.import_module("timm_optim.lamb").Lamb


def authors_alto() -> Any:
    """The ALTO of the package e-optimizer-adaptor."""
    return importlib.import_module("ALTO").ALTO


def contenders(device: str) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """Makers of all optimizers, that of the most states first; missing packages raise."""
    settings: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.01}
    alto: Callable[..., ALTO] = functools.partial(ALTO, **settings)
    bf16: Callable[..., ALTO] = functools.partial(ALTO, **settings, state_dtype="bf16")
    found: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "authors' ALTO": lambda p: authors_alto()(p, betas=(0.99, 0.9, 0.99), **settings),
        "ALTO": alto,
        "ALTO, layers cut": lambda p: cut(alto(p), p),
        "ALTO, bf16 states": bf16,
        "ALTO, bf16 states, layers cut": lambda p: cut(bf16(p), p),
        "LAMB (ALTO, alpha 0)": functools.partial(alto, alpha=0.0),
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True, **settings),
        "timm Lamb": lambda p: timm_lamb()(p, **settings),
    }
    if device == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeedCPUAdam"] = lambda p: DeepSpeedCPUAdam(p, **settings)
    else:
        from deepspeed.ops.adam import FusedAdam
        from deepspeed.ops.lamb import FusedLamb

        found["DeepSpeed FusedAdam"] = lambda p: FusedAdam(p, **settings)
        found["DeepSpeed FusedLamb"] = lambda p: FusedLamb(p, **settings)
    return found


class StatePool:
    """Lets optimizers that take turns share the memory of states of one name.

    All of them together would not fit into memory. The values are then no optimizer's own, which
    changes no time.
    """

    def __init__(self) -> None:
        self.pool: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def share(self, optimizer: Optimizer, params: list[nn.Parameter]) -> None:
        """Put the pool's tensors in place of the states of ``params``."""
        for index, param in enumerate(params):
            state = optimizer.state[param]
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == param.shape:
                    state[name] = self.pool.setdefault((name, index, value.dtype), value)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(action: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds that ``action`` takes."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    actions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each action in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(repeats + 1):
        for name, action in actions.items():
            seconds = timed(action, device)
            if round_:
                times[name].append(seconds)
    return times


def ratio(times: list[float], of: list[float]) -> float:
    """Median of the ratios in each round."""
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


def arguments() -> argparse.Namespace:
    """Of one benchmark: the file for its rows, and what __main__ passes on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("report")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def write(report: str, rows: list[dict[str, Any]]) -> None:
    Path(report).write_text(json.dumps(rows))
