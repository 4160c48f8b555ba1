"""megatron-core's own optimizers with ALTO or E inside, on 4 ranks, equal whole layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from alto_ds.megatron.layer_wise import reasons_against
from tests.sharding.harness import measured
from tests.sharding.megatron_cases import (
    CASES,
    EXPERTS,
    REFUSED,
    SHAPES,
    STEPS,
    MegatronCase,
    train,
)

SLOW = [name for name, case in CASES.items() if case.slow]


def rows(which: Callable[[MegatronCase], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrize a test by the rows that train."""
    names = [name for name, case in CASES.items() if case.measures is train and which(case)]
    marks = {name: [pytest.mark.slow] if CASES[name].slow else [] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in names])


def results(name: str) -> list[dict[str, Any]]:
    """What each rank measured; rows that are slow share a launch of their own."""
    return measured(4, name, *(SLOW if CASES[name].slow else ()))


exact_rows = rows(lambda case: not case.naive)
alto_rows = rows(lambda case: not case.naive and "type" not in case.settings)


@exact_rows
def test_masters_states_and_ratios_equal_the_unsharded_optimizer(name: str) -> None:
    for rank in results(name):
        assert rank["moved"] > 0.1
        assert rank["masters"] < 1e-6
        assert all(error < 1e-6 for error in rank["states"].values())
        assert len(rank["states"]) == 3
        assert rank["weights"] < (2**-8 if CASES[name].bf16 else 1e-6)
        assert rank["norm"] < 1e-6
        assert rank.get("ratios", 0.0) < 1e-6


@exact_rows
def test_copies_of_a_parameter_stay_equal_to_the_bit(name: str) -> None:
    """Replicas, and the embedding that the first and the last stage of a pipeline share."""
    assert [rank["copies_differ"] for rank in results(name)] == [0] * 4


@alto_rows
def test_all_ranks_join_one_all_reduce_of_16_bytes_a_layer_and_16_more_per_group(name: str) -> None:
    for rank in results(name):
        assert rank["sent"] == [[sizes] * STEPS for sizes in rank["expected"]]


def test_what_is_added_up_over_which_ranks() -> None:
    """The precondition: data-parallel groups where states are sharded, tensor-parallel ones."""

    def sent(name: str) -> list[list[int]]:
        (found,) = {str(rank["expected"]) for rank in results(name)}
        return json.loads(found)

    layers, cut, experts = 9, 4, EXPERTS // 2
    assert sent("megatron-dp4-distributed-fp32") == [[16 * (layers + 1)]]
    assert sent("megatron-tp2-distributed-bf16") == [[16 * (layers + 1), 16 * (cut + 1)]]
    assert sent("megatron-tp2-fp32") == [[16 * (cut + 1)]]
    assert sent("megatron-ep2-distributed-bf16") == [[16 * (4 + 1)], [16 * (experts + 1)]]
    assert sent("megatron-ep2-fp32") == [[], []]
    # Here tensor parallelism cuts one dense layer and no expert,
    assert sent("megatron-tp2-ep2") == [[16 * (4 + 1), 16 * (1 + 1)], [16 * (experts + 1)]]
    # and here all experts of a rank and no dense layer.
    assert sent("megatron-ep2-etp2") == [[16 * (2 + 1)], [16 * (experts + 1)]]


@rows(lambda case: case.distributed)
def test_layers_are_cut_and_absent_on_some_ranks(name: str) -> None:
    """The precondition."""
    held = [rank["held"] for rank in results(name)]
    pieces = [{layer: size for part in rank for layer, size in part.items()} for rank in held]
    assert any(0 < sum(layer in rank for rank in pieces) < 4 for layer in SHAPES)
    assert any(rank[layer] < math.prod(SHAPES[layer]) for rank in pieces for layer in rank)


@rows(lambda case: case.layer_wise)
def test_layer_wise_a_data_parallel_rank_has_whole_layers_and_the_others_none(name: str) -> None:
    """The precondition."""
    cut_into = CASES[name].topology.tensor_model_parallel_size
    held = [set().union(*rank["held"]) for rank in results(name)]
    trained = [layer for layer in SHAPES if layer.split(".")[0] in CASES[name].layers]
    assert [sum(layer in rank for rank in held) for layer in trained] == [cut_into] * len(trained)


def test_layer_wise_refuses_what_megatron_core_refuses_beside_it() -> None:
    name = "overlap_param_gather_with_optimizer_step"
    names = (name, "use_distributed_optimizer")
    config = SimpleNamespace(**dict.fromkeys(names, False))
    assert list(reasons_against(config, config)) == []
    setattr(config, name, True)
    (reason,) = reasons_against(config, config)
    assert reason.startswith(f"config.{name}=True cannot be combined with use_layer_wise")


def test_a_rank_holds_nothing() -> None:
    """The precondition: it joins all the same, or the others would wait for it."""
    held = [rank["held"] for rank in results("megatron-small")]
    assert held[1] == [{}]
    assert sum("small.weight" in rank[0] for rank in held) == 2


@alto_rows
def test_only_decayed_groups_are_scaled(name: str) -> None:
    """Also by a stage of a pipeline: megatron-core's wd_mult says it, on all ranks alike."""
    scaled = {layer for rank in results(name) for layer in rank["scaled"]}
    trained = [layer for layer in SHAPES if layer.split(".")[0] in CASES[name].layers]
    assert scaled == {layer for layer in trained if len(SHAPES[layer]) > 1}


def test_the_rows_have_every_wrapper_of_megatron_core() -> None:
    names = [
        name
        for name, case in CASES.items()
        if case.measures is train and not case.slow and not case.layer_wise
    ]
    found = {wrapper for name in names for wrapper in results(name)[0]["wrappers"]}
    assert found == {"DistributedOptimizer", "FP32Optimizer", "Float16OptimizerWithFloat16Params"}


@rows(lambda case: case.naive)
def test_a_part_taken_for_a_layer_is_caught(name: str) -> None:
    assert max(rank["masters"] for rank in results(name)) > 1e-2


MESSAGES = {
    "use_precision_aware_optimizer": "ValueError: alto_ds.megatron: config.use_precision_aware",
    "optimizer_cpu_offload": "ValueError: alto_ds.megatron: config.optimizer_cpu_offload=True",
    "optimizer_cuda_graph": "ValueError: alto_ds.megatron: config.optimizer_cuda_graph=True",
    "optimizer": "ValueError: alto_ds.megatron: config.optimizer='sgd'",
    "fp16": "ValueError: alto_ds.megatron: config.fp16=True is not supported",
    "decoupled_weight_decay": "alto_ds.megatron: config.decoupled_weight_decay=False is not",
    "perform_initialization": "perform_initialization=False leaves layers without the mark",
    "expert": "expert_tensor_parallel_size=1 beside tensor_model_parallel_size=2 is supported with",
    "nonfinite": 'nonfinite="skip" is not supported',
    "use_layer_wise_distributed_optimizer": "config.use_distributed_optimizer=True shards layers",
    "num_distributed_optimizer_instances": "num_distributed_optimizer_instances=2 is not",
    "use_megatron_fsdp": "use_megatron_fsdp=True",
    "fp8_param": "ValueError: alto_ds.megatron: fp8_param=True",
    "fp4_param": "ValueError: alto_ds.megatron: fp4_param=True",
    "gtp_weight_remat_size": "ValueError: alto_ds.megatron: gtp_weight_remat_size=2 cuts layers",
    "expert_gtp_weight_remat_size": "alto_ds.megatron: expert_gtp_weight_remat_size=2 cuts layers",
    "grouped": "module.grouped is a GroupedMLP, which keeps all experts of a rank in one",
    "lr": "ValueError: alto_ds.megatron: lr=0.1 is megatron-core's: set lr in its OptimizerConfig",
    "weight_decay": "ValueError: alto_ds.megatron: weight_decay=0.1 is megatron-core's",
    "alhpa": "alhpa=-5.0 is no setting of ALTO; did you mean 'alpha'?",
    "type": 'type=\'LAMB\' must be "ALTO" or "E"',
    "betas": "ValueError: betas=(0.9, 0.999) must be three numbers",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_on_all_ranks(name: str) -> None:
    ranks: list[dict[str, Any]] = measured(4, "megatron-refused")
    messages = {rank["messages"][name] for rank in ranks}
    assert len(messages) == 1
    assert MESSAGES[name] in messages.pop()
    assert all(rank["untouched"] for rank in ranks)
