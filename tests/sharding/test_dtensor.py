"""FSDP2, DTensor's tensor parallelism and DDP, without DeepSpeed, equal whole tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.launcher import ROOT
from tests.sharding.checkpoint_cases import CASES as CHECKPOINT_CASES
from tests.sharding.checkpoint_cases import PLACES
from tests.sharding.dtensor_cases import CASES, STEPS, DTensorCase, e_over_adamw, run_exact
from tests.sharding.harness import NaiveALTO, measured


def names(chosen: Callable[[DTensorCase], bool]) -> list[str]:
    return [name for name, case in CASES.items() if case.measures is run_exact and chosen(case)]


@pytest.mark.parametrize("name", names(lambda case: case.make is not NaiveALTO))
def test_parameters_and_states_equal_the_unsharded_optimizer(name: str) -> None:
    """To 1e-6, and with float64 to 1e-12."""
    case = CASES[name]
    for rank in measured(4, name):
        # Precondition: the model's own gradients, not another's.
        assert rank["gradients"] < (0.2 if case.half else 1e-5)
        limit = 1e-12 if case.dtype == torch.float64 else 1e-6
        assert rank["parameters"] < limit
        assert rank["states"] < limit


@pytest.mark.parametrize("name", names(lambda case: case.make not in (NaiveALTO, e_over_adamw)))
def test_trust_ratios_are_those_of_whole_layers(name: str) -> None:
    assert all(rank["ratios"] < 1e-6 for rank in measured(4, name))


@pytest.mark.parametrize("name", names(lambda case: case.uneven))
def test_ranks_hold_unequal_parts_down_to_nothing(name: str) -> None:
    """The precondition: all layers straddle ranks, and some ranks have nothing of a layer."""
    sizes = [rank["local_sizes"] for rank in measured(4, name)]
    assert any(0 in rank for rank in sizes)
    assert sum(len(set(layer)) > 1 for layer in zip(*sizes, strict=True)) >= 2


def test_a_local_part_taken_for_a_layer_is_caught() -> None:
    assert all(rank["parameters"] > 1e-2 for rank in measured(4, "fsdp2-naive"))


@pytest.mark.parametrize("name", names(lambda case: case.sent is not None))
def test_one_all_reduce_for_each_dimension_of_the_mesh_that_cuts(name: str) -> None:
    """Bytes of each call of torch.distributed.all_reduce in each step()."""
    for rank in measured(4, name):
        assert rank["sent"] == [list(CASES[name].sent or ())] * STEPS


def test_a_distributed_checkpoint_goes_from_4_ranks_to_2_and_to_2_x_2() -> None:
    """States and settings to the bit, into a new and into a stepped optimizer; then 10 steps."""
    goes_on_elsewhere("moved-e-over-alto")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CHECKPOINT_CASES.items() if case.slow])
def test_so_does_that_of_each_optimizer(name: str) -> None:
    goes_on_elsewhere(name, *(name for name, case in CHECKPOINT_CASES.items() if case.slow))


def goes_on_elsewhere(name: str, *only: str) -> None:
    for rank in measured(4, name, *only):
        for place, chosen in PLACES.items():
            assert rank[place]["fresh"] == rank[place]["stepped"] == [], place
            # Otherwise other random numbers round the states.
            alike = chosen.ranges or not CHECKPOINT_CASES[name].rounds
            assert rank[place]["then"] < (1e-6 if alike else 0.05), place


def test_distributed_data_parallel_equals_one_process() -> None:
    assert all(rank["masters"] < 1e-5 for rank in measured(2, "ddp"))


WITHOUT_DEEPSPEED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import alto_ds

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = torch.nn.Linear(3, 5)
fully_shard(model)
optimizer = alto_ds.ALTO(model.parameters(), lr=0.1)
before = model.weight.to_local().clone()
model(torch.ones(2, 3)).square().sum().backward()
optimizer.step()
assert not torch.equal(before, model.weight.to_local())
assert "deepspeed" not in sys.modules
dist.barrier()
os._exit(0)  # for gloo's threads abort a process now and then when it ends in order
"""


def test_deepspeed_is_not_imported(tmp_path: Path) -> None:
    """By two ranks that step under fully_shard."""
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
