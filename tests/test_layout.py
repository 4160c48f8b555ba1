"""The fragments of all ranks tile every layer exactly once, for any shapes and number of ranks.

ZeRO's tensors are imitated here without processes, from the rules that ``alto_ds/layout/zero.py``
states; ``tests/sharding`` has the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from alto_ds import ALTO
from alto_ds.layout import Fragment, Layer, Layout, resolve

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@dataclass(frozen=True)
class Group:
    """Stands in for a process group, as one of its ranks sees it."""

    rank: int
    size: int


@pytest.fixture(scope="module", autouse=True)
def virtual_ranks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_rank", lambda group: group.rank)
        patch.setattr(dist, "get_world_size", lambda group: group.size)
        yield


def flat_group(
    sizes: list[int], order: list[int], gap: int, group: Group
) -> tuple[Any, list[nn.Parameter]]:
    """ZeRO-1/2: views of a padded buffer in any order, with gaps; this rank's slice."""
    offsets, position = [0] * len(sizes), 0
    for index in order:
        offsets[index] = position
        position += sizes[index] + gap
    part = -(-position // group.size)
    buffer = torch.zeros(part * group.size)
    params = []
    for size, offset in zip(sizes, offsets, strict=True):
        param: Any = nn.Parameter(torch.empty(0))
        param.data = buffer[offset : offset + size]
        param._hp_mapping, param._dp_group = None, group
        params.append(param)
    return nn.Parameter(torch.empty(part)), params


def zero3_groups(
    sizes_of_groups: list[list[int]], ranks: Group
) -> list[tuple[Any, list[nn.Parameter]]]:
    """ZeRO-3: each parameter's data is elsewhere, this rank's parts are in a row."""
    zero3 = SimpleNamespace(fp32_partitioned_groups_flat=[], fp16_groups=[])
    for sizes in sizes_of_groups:
        params = []
        for size in sizes:
            param: Any = nn.Parameter(torch.empty(0))
            param.ds_numel, param.ds_process_group = size, ranks
            param.ds_tensor = SimpleNamespace(ds_numel=-(-size // ranks.size))
            param._z3_optimizer = zero3
            params.append(param)
        flat = nn.Parameter(torch.empty(sum(p.ds_tensor.ds_numel for p in params)))
        zero3.fp32_partitioned_groups_flat.append(flat)
        zero3.fp16_groups.append(params)
    return list(zip(zero3.fp32_partitioned_groups_flat, zero3.fp16_groups, strict=True))


def check_tiling(layouts: list[Layout], lengths: list[list[int]], sizes: list[int]) -> None:
    """All ranks list the same layers and together cover each once, without overlap in a tensor.

    Args:
        layouts: of each rank.
        lengths: of each rank's tensors.
        sizes: of the layers.
    """
    covered: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for layout, own in zip(layouts, lengths, strict=True):
        assert [layer.name for layer in layout.layers] == [str(i) for i in range(len(sizes))]
        ends = [0] * len(own)
        for f in sorted(layout.fragments, key=lambda f: f.offset):
            assert f.length > 0
            assert f.offset >= ends[f.tensor]
            assert f.whole is (f.length == sizes[f.layer])
            ends[f.tensor] = f.offset + f.length
            covered[f.layer].append((f.start, f.length))
        assert all(end <= length for end, length in zip(ends, own, strict=True))
    for ranges, size in zip(covered, sizes, strict=True):
        position = 0
        for start, length in sorted(ranges):
            assert start == position
            position += length
        assert position == size


GROUPS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=12), min_size=1, max_size=3)
RANKS = st.integers(1, 64)


def check_groups(groups_of_ranks: list[list[tuple[Any, list[nn.Parameter]]]], sizes: Any) -> None:
    """Each rank resolves each of its groups, as an optimizer does; check them group by group."""
    for place, sizes_of_group in enumerate(sizes):
        layouts, lengths = [], []
        for groups in groups_of_ranks:
            flat, params = groups[place]
            layouts.append(resolve([flat], params, {p: str(i) for i, p in enumerate(params)}))
            lengths.append([flat.numel()])
        check_tiling(layouts, lengths, sizes_of_group)


@settings(deadline=None, max_examples=200)
@given(sizes=GROUPS, ranks=RANKS, gap=st.integers(0, 16), data=st.data())
def test_slices_of_a_flat_buffer_tile_every_layer(
    sizes: list[list[int]], ranks: int, gap: int, data: Any
) -> None:
    orders = [data.draw(st.permutations(range(len(group)))) for group in sizes]
    check_groups(
        [
            [
                flat_group(group, order, gap, Group(rank, ranks))
                for group, order in zip(sizes, orders, strict=True)
            ]
            for rank in range(ranks)
        ],
        sizes,
    )


@settings(deadline=None, max_examples=200)
@given(sizes=GROUPS, ranks=RANKS)
def test_parts_of_zero3_tile_every_layer(sizes: list[list[int]], ranks: int) -> None:
    check_groups([zero3_groups(sizes, Group(rank, ranks)) for rank in range(ranks)], sizes)


def test_a_deepspeed_with_other_attributes_is_refused() -> None:
    ((flat, params),) = zero3_groups([[5, 6]], Group(0, 2))
    del params[1].ds_numel  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"looked for _hp_mapping, .* this version .*ds_numel"):
        resolve([flat], params, dict.fromkeys(params, "layer"))


def test_parameters_that_were_moved_out_of_the_buffer_are_refused() -> None:
    flat, params = flat_group([5, 6], [0, 1], 0, Group(0, 2))
    params[1].data = torch.zeros(6)
    with pytest.raises(RuntimeError, match="views of one flat buffer"):
        resolve([flat], params, dict.fromkeys(params, "layer"))


def test_a_layout_that_reaches_beyond_its_tensor_is_refused() -> None:
    """Which a new framework's module could get wrong; kernels go by address."""
    tensor = nn.Parameter(torch.ones(8))
    tensor.grad = torch.ones(8)
    optimizer = ALTO([tensor])
    layout = Layout((Layer(tensor, "layer"),), (Fragment(0, 3, 6, 0, 0, whole=False),))
    optimizer._layout = lambda group: layout  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="layout of layer reaches to element 9 of a tensor of 8"):
        optimizer.step()
