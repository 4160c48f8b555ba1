"""The plan's figures are those of real engines, and wrong configurations are refused by name."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import alto_ds  # noqa: F401  registers the optimizer types
from alto_ds.layout.cut import part_size, pieces_of_parts, pieces_of_slice, slice_size
from alto_ds.plan import __main__ as command
from alto_ds.plan.activations import measure, meta_model
from alto_ds.plan.choice import BESIDES, plan, recommended
from alto_ds.plan.duration import GPUS, Speeds
from alto_ds.plan.job import Job, read_job
from alto_ds.plan.memory import elements
from alto_ds.plan.traffic import gathering, traffic
from alto_ds.pretrain import presets
from alto_ds.pretrain.model import parameter_groups
from alto_ds.pretrain.settings import ModelSettings
from tests.pretrain.forked import Forks

MEASURE = "tests/scripts/measure_runs.py"
VOCABULARY = 1000
# Layers without weight decay have 510 elements, which two ranks pad to 512.
MODEL: dict[str, Any] = {
    "model": "gpt2-tiny",
    "n_layer": 1,
    "n_embd": 34,
    "n_head": 2,
    "seq_length": 16,
}
PAPER = Path("gpt2-medium", "paper_alto.json")
SPEEDS = Speeds(gpu=GPUS["h100"])


def config(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 2000}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "ALTO", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "steps_per_print": 1000000,
    } | more


# Layers are gathered again for the backward pass.
ZERO_3_KEEPS_LITTLE = "ZeRO-3 that keeps little"
# What DeepSpeed calls for each collective.
CALLS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
}
CASES = {
    "ZeRO-1": {"config": config(1), "model": MODEL},
    "ZeRO-2": {"config": config(2), "model": MODEL},
    "ZeRO-3": {"config": config(3), "model": MODEL},
    "LAMB in bf16 with bf16 states": {
        "config": config(
            1,
            bf16={"enabled": True},
            optimizer={"type": "ALTO", "params": {"alpha": 0.0, "state_dtype": "bf16"}},
        ),
        "model": MODEL,
    },
    ZERO_3_KEEPS_LITTLE: {
        "config": config(3)
        | {
            "zero_optimization": {
                "stage": 3,
                "stage3_max_reuse_distance": 30000,
                "stage3_prefetch_bucket_size": 0,
                "stage3_param_persistence_threshold": 2000,
                "sub_group_size": 10000,
            }
        },
        "model": MODEL | {"n_layer": 2, "n_embd": 64},
    },
}


def job_of(case: dict[str, Any], ranks: int) -> Job:
    return read_job(
        case["config"],
        ModelSettings(**case["model"]),
        nodes=1,
        gpus_per_node=ranks,
        vocab_size=VOCABULARY,
        steps=None,
    )


def pieces_of(job: Job, rank: int) -> list[list[Any]]:
    """By the plan's arithmetic: name, start and length of all that a rank has."""
    found: list[list[Any]] = []
    groups = parameter_groups(meta_model(job.model, VOCABULARY))
    for group, sizes in zip(groups, job.sizes, strict=True):
        if job.zero.stage == 3:
            parts = [(size, part_size(size, job.ranks), rank) for size in sizes]
            pieces = list(pieces_of_parts(parts))
        else:
            places = [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
            pieces = list(pieces_of_slice(places, slice_size(sizes, job.ranks), rank))
        found += [[group["param_names"][p.layer], p.start, p.length] for p in pieces]
    return sorted(found)


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_plan_has_the_elements_states_and_bytes_of_real_engines(
    forks: Forks, tmp_path: Path, ranks: int
) -> None:
    report = tmp_path / "report.json"
    cases = json.dumps(list(CASES.values()))
    started = forks.start(ranks, str(report), cases, script=MEASURE)
    printed = [rank.log for rank in started]
    assert forks.wait(started, 200) == [0] * ranks, [log.read_text()[-2000:] for log in printed]
    for (name, case), found in zip(CASES.items(), json.loads(report.read_text()), strict=True):
        job = job_of(case, ranks)
        planned: Counter[str] = Counter()
        for kind in traffic(job):
            planned[CALLS[kind.collective]] += kind.bytes
        for rank, measured in enumerate(found):
            assert measured["elements"] == elements(job), name
            assert measured["pieces"] == pieces_of(job, rank), name
            states = {state: size * elements(job) for state, size in job.states.items()}
            assert measured["states"] == states, name
            if ranks > 1:
                few = measured["sent"]["all_reduce"] - planned["all_reduce"]
                # DeepSpeed adds a few numbers of its own: the gradient's norm, and overflow.
                assert 0 < few <= 64, name
                assert measured["sent"] == planned | {"all_reduce": planned["all_reduce"] + few}


def test_layers_that_are_used_again_soon_are_gathered_once() -> None:
    kept = gathering(job_of(CASES["ZeRO-3"], 2))
    assert kept.peak == sum(kept.sizes)
    freed = gathering(job_of(CASES[ZERO_3_KEEPS_LITTLE], 2))
    assert len(freed.sizes) > len(kept.sizes)
    assert freed.peak < sum(freed.sizes) / 2


def test_checkpointing_keeps_less_and_activations_grow_with_the_micro_batch() -> None:
    again = ModelSettings(model="gpt2", activation_checkpointing=True)
    one, two = (measure(ModelSettings(model="gpt2"), 50257, torch.bfloat16, n) for n in (1, 2))
    assert measure(again, 50257, torch.bfloat16, 1).kept < one.kept / 3
    assert two.kept == pytest.approx(2 * one.kept, rel=0.01)


@pytest.mark.parametrize("nodes", [1, 8, 64, 512])
def test_the_papers_run_is_planned_for_thousands_of_gpus(nodes: int) -> None:
    paper = presets.files()[PAPER]
    paper["train_micro_batch_size_per_gpu"] = 1
    model = ModelSettings(model="gpt2-medium")
    job = read_job(paper, model, nodes=nodes, gpus_per_node=8, vocab_size=50257, steps=None)
    made = plan(job, SPEEDS)
    assert made.fits
    assert job.accumulation * job.ranks == 4096
    own = elements(job)
    assert job.numel <= own * job.ranks < job.numel + 4 * job.ranks
    assert made.memory.always["exp_avg_sq"] == 4 * own
    # 16 bytes a layer and 16 a call, whatever the number of ranks.
    assert traffic(job)[-1].bytes == 16 * 292 + 2 * 16


def test_what_does_not_fit_is_told_what_to_change() -> None:
    config = presets.tiny(1) | {"train_batch_size": 512, "train_micro_batch_size_per_gpu": 64}
    model = ModelSettings(model="gpt2-tiny")
    job = read_job(config, model, nodes=1, gpus_per_node=8, vocab_size=50257, steps=None)

    def on(gibibytes: float) -> Speeds:
        return Speeds(gpu=GPUS["l4"]._replace(gibibytes=gibibytes))

    little = 0.9 * (plan(job, SPEEDS).memory.peak + BESIDES) / 2**30
    assert not plan(job, on(little)).fits
    best = recommended(job, on(little))
    assert best is not None
    assert best.fits
    assert best.job.batch_size == job.batch_size
    assert best.job.micro_batch_size < job.micro_batch_size
    assert recommended(job, on(3)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batch_size": 4095}, "train_batch_size=4095 is not a multiple of"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps=7; leave out"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0 is not planned"),
        ({"zero_optimisation": {}}, "zero_optimisation is not known to DeepSpeed"),
        ({"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}, 'optimizer.type="SGD" is not'),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(presets.files()[PAPER] | change))
    monkeypatch.setattr(sys, "argv", ["plan", str(path), "--model", "gpt2-medium"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_the_command_prints_a_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(2) | {"train_micro_batch_size_per_gpu": 2}))
    options = ["--model", "gpt2-tiny", "--nodes", "2", "--steps", "1000"]
    monkeypatch.setattr(sys, "argv", ["plan", str(path), *options])
    command.main()
    assert "16 GPUs, ZeRO-2" in (table := capsys.readouterr().out)
    assert "1,000 steps take" in table
    monkeypatch.setattr(sys, "argv", ["plan", str(path), *options, "--json"])
    command.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["train_batch_size"] == 2 * 3 * 16
    assert figures["seconds_per_step"] == pytest.approx(sum(figures["seconds"].values()))
