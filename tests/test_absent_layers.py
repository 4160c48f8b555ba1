"""Ranks that hold no part of some layers, or of any, step as exactly as all others.

So it is under megatron-core's DistributedOptimizer: a rank has a tensor for each parameter of which
it holds a piece, and none for the others. Layers, cuts and ranks are drawn at random here, and each
rank is a thread of this process; ``tests/sharding`` has such a row on real ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alto_ds import ALTO, trust_ratio
from alto_ds.layout import FRAMEWORKS, Fragment, Framework, Layer, Layout

STEPS = 3
SECONDS = 5  # after which a rank that waits for others is said to hang


class Group:
    """Stands in for a process group whose ranks are threads."""

    def __init__(self, ranks: int) -> None:
        self.meeting = threading.Barrier(ranks, timeout=SECONDS)
        self.parts: dict[int, Tensor] = {}

    def all_reduce(self, tensor: Tensor) -> None:
        self.parts[threading.get_ident()] = tensor.clone()
        self.meeting.wait()
        assert len({part.shape for part in self.parts.values()}) == 1, "unequal lengths"
        total = torch.stack(list(self.parts.values())).sum(0)
        self.meeting.wait()
        tensor.copy_(total)


def resolve(tensors: Sequence[Any], params: Sequence[Any], names: Any) -> Layout | None:
    """What a framework knows whose tensors say themselves what they hold."""
    if not all(hasattr(param, "shared_by") for param in params):
        return None
    layers = tuple(Layer(param, names[param], (param.shared_by,)) for param in params)
    place = {param: i for i, param in enumerate(params)}
    fragments = []
    for index, tensor in enumerate(tensors):
        offset = 0
        for param, start, length in tensor.pieces:
            whole = length == param.numel()
            fragments.append(Fragment(index, offset, length, start, place[param], whole))
            offset += length + tensor.gap
    return Layout(layers, tuple(fragments))


@pytest.fixture(scope="module", autouse=True)
def threads_as_ranks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda tensor, group: group.all_reduce(tensor))
        patch.setattr(trust_ratio, "_collective_device", lambda group, device: device)
        FRAMEWORKS.insert(0, Framework(resolve=resolve))
        yield
        del FRAMEWORKS[0]


@st.composite
def models(draw: Any) -> dict[str, Any]:
    """Groups of layers, where each layer is cut between the ranks, and which have a gradient."""
    ranks = draw(st.integers(1, 4))
    layers = []
    for _ in range(draw(st.integers(1, 7))):
        size = draw(st.integers(1, 40))
        inner = draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))
        layers.append({"cuts": [0, *sorted(inner), size], "used": draw(st.integers(0, 4)) > 0})
    return {
        "ranks": ranks,
        "layers": layers,
        "first_group": draw(st.integers(1, len(layers))),
        "gap": draw(st.none() | st.integers(0, 5)),  # of flat tensors; None: a tensor a piece
    }


def settings_of(params: Sequence[Any], first_group: int) -> list[dict[str, Any]]:
    return [
        {"params": list(params[:first_group])},
        {"params": list(params[first_group:]), "weight_decay": 0.0, "lr": 0.05},
    ]


def tensors_of(params: Sequence[Any], pieces: dict[Any, slice], gap: int | None) -> list[Any]:
    """This rank's tensors for the parameters of one group; with a gap, one flat tensor at most."""
    held = [param for param in params if pieces[param].stop > pieces[param].start]
    bundles = [[param] for param in held] if gap is None else [held] if held else []
    tensors = []
    for bundle in bundles:
        parts = []
        for param in bundle:
            parts += [param.detach()[pieces[param]], torch.full((gap or 0,), torch.nan)]
        tensor: Any = nn.Parameter(torch.cat(parts).double())
        tensor.gap = gap or 0
        tensor.pieces = [
            (param, pieces[param].start, pieces[param].stop - pieces[param].start)
            for param in bundle
        ]
        tensors.append(tensor)
    return tensors


# Not shrunk, for where ranks hang each try takes seconds.
@settings(deadline=None, max_examples=150, phases=[Phase.generate])
@given(model=models(), seed=st.integers(0, 2**32))
def test_ranks_without_some_layers_step_exactly(model: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [layer["cuts"][-1] for layer in model["layers"]]
    start = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    # Tensors that hold several layers have one gradient for all of them.
    used = [layer["used"] or model["gap"] is not None for layer in model["layers"]]
    grads = [
        [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        for _ in range(STEPS)
    ]

    yardstick_params = [nn.Parameter(value.clone()) for value in start]
    yardstick = ALTO(settings_of(yardstick_params, model["first_group"]), lr=0.1)
    for step in range(STEPS):
        for param, grad, has in zip(yardstick_params, grads[step], used, strict=True):
            param.grad = grad if has else None
        yardstick.step()
    group = Group(model["ranks"])

    def run(rank: int) -> tuple[dict[int, Tensor], dict[str, Any]]:
        params: list[Any] = [nn.Parameter(value.clone()) for value in start]
        pieces = {}
        for param, layer in zip(params, model["layers"], strict=True):
            param.shared_by = group
            pieces[param] = slice(*layer["cuts"][rank : rank + 2])
        optimizer = ALTO(settings_of(params, model["first_group"]), lr=0.1)
        place = {param: i for i, param in enumerate(params)}
        for own in optimizer.param_groups:
            own["params"] = tensors_of(own["params"], pieces, model["gap"])
        tensors = [tensor for own in optimizer.param_groups for tensor in own["params"]]
        for step in range(STEPS):
            for tensor in tensors:
                tensor.grad = torch.full_like(tensor, torch.nan)
                offset = 0
                for param, begin, length in tensor.pieces:
                    part = grads[step][place[param]][begin : begin + length]
                    tensor.grad[offset : offset + length] = part
                    offset += length + tensor.gap
                if not all(used[place[param]] for param, *_ in tensor.pieces):
                    tensor.grad = None
            optimizer.step()
        found: dict[int, Tensor] = {}
        for tensor in tensors:
            offset = 0
            for param, _, length in tensor.pieces:
                found[place[param]] = tensor.detach()[offset : offset + length]
                offset += length + tensor.gap
        return found, optimizer.trust_ratios()

    with ThreadPoolExecutor(model["ranks"]) as pool:
        results = list(pool.map(run, range(model["ranks"])))

    for index, expected in enumerate(yardstick_params):
        whole = torch.cat([found[index] for found, _ in results if index in found])
        assert torch.allclose(whole, expected, rtol=1e-12, atol=1e-14)
    right = yardstick.trust_ratios()
    for _, ratios in results:
        assert ratios.keys() == right.keys()
        for name, row in right.items():
            assert ratios[name] == pytest.approx(row, rel=1e-12)
            assert ratios[name] == results[0][1][name]
