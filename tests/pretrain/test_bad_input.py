"""Bad input of the main job: one clear line that names what is wrong, and what to write instead."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

pytest.importorskip("deepspeed")

from alto_ds.pretrain.command import parse_arguments
from alto_ds.pretrain.data.text import documents
from alto_ds.pretrain.data.tokenizer import make_tokenizer
from alto_ds.pretrain.deepspeed_json import check_values, read_deepspeed_json
from alto_ds.pretrain.identity import FILE, check_identity, write_identity
from alto_ds.pretrain.metrics import Metrics, read_metrics
from alto_ds.pretrain.settings import DataSettings, ModelSettings, RunSettings
from tests.fuzzing import CHANCES, mutated
from tests.launcher import ROOT
from tests.pretrain.forked import Forks
from tests.pretrain.runs import options

pytestmark = pytest.mark.usefixtures("datasets_cache")

TINY = ROOT / "configs/gpt2-tiny/zero2.json"
CONFIG = json.loads(TINY.read_text())
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}
E_ADAMW = {"type": "E", "params": {"optimizer": "AdamW", "lr": 1e-3}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
LEAVE_OUT = "leave it out for the default"


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny model's JSON with values at paths such as ``optimizer.params.lr``."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *sections, key = path.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = copy.deepcopy(value)
    return config


def refused(capsys: pytest.CaptureFixture[str], config: Path, *more: str) -> str:
    """The one line with which the command ends."""
    required = ["--model", "gpt2-tiny", "--output_dir", "out", "--deepspeed_config", str(config)]
    with pytest.raises(SystemExit) as end:
        parse_arguments([*required, *more])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("alto_ds.pretrain: error: ")
    assert printed.count("\n") == 1
    return printed


# What is changed in a good JSON, and what the error says.
WRONG_JSON: list[tuple[dict[str, Any], str]] = [
    # keys that are not known
    ({"gradient_cliping": 1.0}, 'gradient_cliping is not known to DeepSpeed; did you mean "grad'),
    ({"zero_optimisation": {"stage": 2}}, 'did you mean "zero_optimization"?'),
    ({"optimiser": ADAMW}, 'did you mean "optimizer"?'),
    ({"schedular": WARMUP}, 'did you mean "scheduler"?'),
    ({"train_batchsize": 8}, 'did you mean "train_batch_size"?'),
    ({"train_micro_batch_size": 8}, 'did you mean "train_micro_batch_size_per_gpu"?'),
    ({"gradient_accumulation_step": 2}, 'did you mean "gradient_accumulation_steps"?'),
    ({"Gradient_Clipping": 1.0}, 'did you mean "gradient_clipping"?'),
    ({"bf_16": {"enabled": True}}, 'did you mean "bf16"?'),
    ({"fp-16": {"enabled": True}}, 'did you mean "fp16"?'),
    ({"wallclock_breakdown": True}, 'did you mean "wall_clock_breakdown"?'),
    ({"step_per_print": 10}, 'did you mean "steps_per_print"?'),
    ({"stage": 2}, 'stage is not known to DeepSpeed; it belongs in "zero_optimization"'),
    ({"overlap_comm": True}, 'it belongs in "zero_optimization"'),
    ({"_comment": "mine"}, "_comment is not known to DeepSpeed"),
    ({"max_grad_norm": 1.0}, 'write "gradient_clipping"'),
    ({"amp": {"enabled": True}}, "Apex AMP integration has been removed"),
    ({"elasticity": {}}, "Elastic training has been removed"),
    ({"optimizer.parmas": {}}, 'optimizer.parmas is not known to DeepSpeed; did you mean "params"'),
    ({"optimizer.typ": "ALTO"}, 'did you mean "type"?'),
    ({"optimizer.lr": 1e-3}, "optimizer.lr is not known to DeepSpeed"),
    ({"scheduler.parms": {}}, 'scheduler.parms is not known to DeepSpeed; did you mean "params"'),
    ({"zero_optimization.stge": 2}, "zero_optimization.stge is not known to DeepSpeed; did you m"),
    ({"zero_optimization.overlap_com": True}, 'did you mean "overlap_comm"?'),
    ({"zero_optimization.offload_optimiser": {}}, 'did you mean "offload_optimizer"?'),
    ({"zero_optimization.stage3_max_live_param": 1}, 'did you mean "stage3_max_live_parameters"?'),
    ({"zero_optimization.offload_optimizer.devise": "cpu"}, "offload_optimizer.devise is not kno"),
    ({"zero_optimization.offload_param.pin_mem": True}, 'did you mean "pin_memory"?'),
    ({"zero_optimization.mics_shard_size": 2}, "mics_shard_size is not known to DeepSpeed"),
    ({"fp16.enable": True}, 'fp16.enable is not known to DeepSpeed; did you mean "enabled"?'),
    ({"fp16.loss_scal": 0}, 'did you mean "loss_scale"?'),
    ({"bf16.enabeld": True}, 'bf16.enabeld is not known to DeepSpeed; did you mean "enabled"?'),
    ({"bf16.loss_scale": 0}, "bf16.loss_scale is not known to DeepSpeed"),
    ({"torch_autocast.dtyp": "bfloat16"}, 'did you mean "dtype"?'),
    ({"activation_checkpointing.partition_activation": True}, 'mean "partition_activations"?'),
    ({"flops_profiler.profile_stp": 1}, 'did you mean "profile_step"?'),
    ({"aio.block_sise": 1}, 'did you mean "block_size"?'),
    ({"data_types.grad_acum_dtype": "fp32"}, 'did you mean "grad_accum_dtype"?'),
    ({"checkpoint.tag_validaton": "Warn"}, 'did you mean "tag_validation"?'),
    ({"comms_logger.enable": True}, 'did you mean "enabled"?'),
    (
        {"tensorboard.job": "x"},
        "tensorboard.job is not known to DeepSpeed; known are enabled, output_path, job_name",
    ),
    ({"csv_monitor.outputpath": "x"}, 'did you mean "output_path"?'),
    ({"compile.deep_compile": True}, 'did you mean "deepcompile"?'),
    ({"timers.through_put": {}}, 'did you mean "throughput"?'),
    ({"timers.throughput.enable": True}, "timers.throughput.enable is not known"),
    ({"optimizer.params.alpah": -5}, 'optimizer.params.alpah is not known to ALTO; did you mean "'),
    ({"optimizer.params.weightdecay": 0.1}, 'did you mean "weight_decay"?'),
    ({"optimizer.params.beta": 0.9}, 'did you mean "betas"?'),
    ({"optimizer.params.max_grad_norm": 1}, 'write "gradient_clipping"'),
    ({"optimizer": ADAMW, "optimizer.params.momentun": 1}, "momentun is not known to AdamW"),
    ({"optimizer": ADAMW, "optimizer.params.alpha": -5}, "params.alpha is not known to AdamW"),
    ({"optimizer": E_ADAMW, "optimizer.params.weight_dcay": 0}, 'did you mean "weight_decay"?'),
    ({"optimizer": E_ADAMW, "optimizer.params.momentum": 0}, "momentum is not known to E"),
    ({"scheduler.params.warmup_num_step": 3}, "warmup_num_step is not known to WarmupCosineLR; d"),
    ({"scheduler.params.warmup_max_lr": 1}, "warmup_max_lr is not known to WarmupCosineLR"),
    # values of another kind
    ({"train_batch_size": "32"}, 'train_batch_size="32" must be a whole number of at least 1; wri'),
    ({"train_batch_size": 32.0}, "train_batch_size=32.0 must be a whole number"),
    ({"train_batch_size": 0}, "train_batch_size=0 must be a whole number of at least 1"),
    ({"train_batch_size": -8}, "train_batch_size=-8 must be"),
    ({"train_batch_size": True}, "train_batch_size=true must be"),
    ({"train_batch_size": [32]}, "train_batch_size=[32] must be"),
    ({"train_micro_batch_size_per_gpu": 1.5}, "train_micro_batch_size_per_gpu=1.5 must be"),
    ({"gradient_accumulation_steps": "2"}, "; write 2 without quotes"),
    ({"steps_per_print": 0}, "steps_per_print=0 must be"),
    ({"gradient_clipping": "1.0"}, 'gradient_clipping="1.0" must be a number; write 1.0 without q'),
    ({"gradient_clipping": -1}, "gradient_clipping=-1 must be a number >= 0"),
    ({"gradient_clipping": True}, "gradient_clipping=true must be a number"),
    ({"gradient_clipping": [1]}, "gradient_clipping=[1] must be a number"),
    ({"wall_clock_breakdown": "true"}, "must be true or false; write true without quotes"),
    ({"wall_clock_breakdown": 1}, "wall_clock_breakdown=1 must be true or false"),
    ({"prescale_gradients": 0}, "prescale_gradients=0 must be true or false"),
    ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
    ({"communication_data_type": 16}, "DeepSpeed cannot read it"),
    ({"gradient_allreduce_op": "max"}, "Invalid gradient_allreduce_op"),
    ({"zero_optimization": True}, "zero_optimization=true must be an object"),
    ({"zero_optimization": 2}, "zero_optimization=2 must be an object"),
    ({"zero_optimization": []}, "zero_optimization=[] must be an object"),
    ({"zero_optimization.stage": "2"}, 'zero_optimization.stage="2" must be a number; write 2'),
    ({"zero_optimization.stage": 4}, "zero_optimization.stage=4: must be 0, 1, 2"),
    ({"zero_optimization.stage": -1}, "zero_optimization.stage=-1: must be 0, 1, 2"),
    ({"zero_optimization.stage": True}, "zero_optimization.stage=true must be a number"),
    ({"zero_optimization.stage": "two"}, 'zero_optimization.stage="two": must be'),
    ({"zero_optimization.stage": 2.5}, "zero_optimization.stage=2.5: must be"),
    ({"zero_optimization.overlap_comm": "yes"}, 'overlap_comm="yes" must be true or false'),
    ({"zero_optimization.overlap_comm": 1}, "overlap_comm=1 must be true or false"),
    ({"zero_optimization.reduce_bucket_size": "5e8"}, 'reduce_bucket_size="5e8"'),
    ({"zero_optimization.reduce_bucket_size": 0}, "reduce_bucket_size=0: must be greater than 0"),
    ({"zero_optimization.reduce_bucket_size": 1.5}, "reduce_bucket_size=1.5: must be"),
    ({"zero_optimization.sub_group_size": -1}, "sub_group_size=-1: must be greater"),
    ({"zero_optimization.offload_optimizer": "cpu"}, 'offload_optimizer="cpu" must be an object'),
    ({"zero_optimization.offload_optimizer.device": "gpu"}, "device=\"gpu\": must be 'none', 'cp"),
    ({"zero_optimization.offload_optimizer.pin_memory": 1}, "pin_memory=1 must be true or false"),
    ({"zero_optimization.offload_param": {"buffer_count": "5"}}, "write 5 without quotes"),
    ({"zero_optimization.compute_grad_norm": False, "zero_optimization.stage": 3}, "only with ZeR"),
    ({"fp16": True}, "fp16=true must be an object"),
    ({"fp16.enabled": "false"}, 'fp16.enabled="false" must be true or false; write false without'),
    ({"fp16.loss_scale": -1}, "fp16.loss_scale must be >= 0"),
    ({"fp16.loss_scale": "128"}, 'fp16.loss_scale="128" must be a number; write 128 without'),
    ({"fp16.loss_scale": True}, "fp16.loss_scale must be a number, not bool"),
    ({"fp16.initial_scale_power": "16"}, 'fp16.initial_scale_power="16" must be a number'),
    ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "loss_scale_window must be > 0"),
    ({"bf16": []}, "bf16=[] must be an object"),
    ({"bf16.enabled": 1}, "bf16.enabled=1 must be true or false"),
    ({"bf16.enabled": True, "fp16.enabled": True}, "cannot be simultaneously enabled"),
    ({"torch_autocast.enabled": "true"}, "torch_autocast.enabled"),
    ({"torch_autocast": {"enabled": True, "dtype": "bf17"}}, "bf17"),
    ({"data_types": "fp32"}, 'data_types="fp32" must be an object'),
    ({"data_types.keep_in_fp32_modules": 3}, "data_types.keep_in_fp32_modules=3 must be a string"),
    ({"checkpoint.tag_validation": "never"}, "tag_validation value of NEVER"),
    ({"checkpoint.load_universal": "no"}, "checkpoint.load_universal"),
    ({"flops_profiler.enabled": 1}, "flops_profiler.enabled=1 must be true or false"),
    ({"aio.queue_depth": "8"}, 'aio.queue_depth="8" must be a whole number; write 8'),
    ({"activation_checkpointing": True}, "activation_checkpointing=true must be an object"),
    ({"timers": 3}, "timers=3 must be an object"),
    ({"timers.throughput.enabled": "x"}, "timers.throughput.enabled"),
    ({"comms_logger.prof_ops": "all"}, "comms_logger.prof_ops"),
    # null, "auto"
    ({"train_batch_size": None}, f"train_batch_size=null: write a value, or {LEAVE_OUT}"),
    ({"gradient_clipping": None}, "gradient_clipping=null"),
    ({"zero_optimization": None}, "zero_optimization=null"),
    ({"zero_optimization.stage": None}, "zero_optimization.stage=null"),
    ({"zero_optimization.offload_optimizer": None}, "offload_optimizer=null"),
    ({"fp16.enabled": None}, "fp16.enabled=null"),
    ({"scheduler": None, "optimizer.params.lr": 1}, "--max_steps is needed"),
    ({"optimizer": None}, "optimizer=null"),
    ({"optimizer.params": None}, "optimizer.params=null"),
    ({"optimizer.params.lr": None}, "optimizer.params.lr=null"),
    ({"optimizer.params.betas": [0.99, None, 0.99]}, "optimizer.params.betas[1]=null"),
    ({"scheduler.params.warmup_num_steps": None}, "scheduler.params.warmup_num_steps=null"),
    ({"train_batch_size": "auto"}, 'train_batch_size="auto" is for Hugging Face Trainer'),
    ({"gradient_clipping": "auto"}, 'gradient_clipping="auto" is for Hugging Face Trainer'),
    ({"zero_optimization.reduce_bucket_size": "auto"}, 'reduce_bucket_size="auto" is for Hugging'),
    ({"fp16.enabled": "auto"}, 'fp16.enabled="auto" is for Hugging Face Trainer'),
    ({"bf16": "auto"}, 'bf16="auto" is for Hugging Face Trainer'),
    ({"optimizer.params.lr": "auto"}, 'optimizer.params.lr="auto" is for Hugging Face Trainer'),
    ({"scheduler.params.warmup_num_steps": "auto"}, 'warmup_num_steps="auto" is for Hugging Face'),
    # optimizer
    ({"optimizer": {}}, "optimizer.type is missing"),
    ({"optimizer": "ALTO"}, 'optimizer="ALTO" must be an object'),
    ({"optimizer.type": "alto"}, 'optimizer.type="alto" is none that DeepSpeed can make; did you'),
    ({"optimizer.type": "AdamWW"}, 'did you mean "AdamW"?'),
    ({"optimizer.type": "Optimizer"}, 'optimizer.type="Optimizer" is none'),
    ({"optimizer.type": "lr_scheduler"}, 'optimizer.type="lr_scheduler" is none'),
    ({"optimizer.type": 3}, "optimizer.type=3 is none"),
    ({"optimizer.params": [1]}, "optimizer.params=[1] must be an object"),
    ({"optimizer.params.alpha": -500}, "alpha=-500 is out of bounds"),
    ({"optimizer.params.alpha": "-5"}, "alpha='-5' must be"),
    ({"optimizer.params.lr": -1}, "lr=-1 is out of bounds"),
    ({"optimizer.params.lr": "1e-2"}, "lr='1e-2' must be made of numbers"),
    ({"optimizer.params.betas": [0.9, 0.99]}, "betas=[0.9, 0.99] must be three numbers"),
    ({"optimizer.params.betas": [0.99, 0.9, 1]}, "betas[2]=1 is out of bounds"),
    ({"optimizer.params.eps": [1e-6]}, "eps=[1e-06] must be three numbers"),
    ({"optimizer.params.weight_decay": -0.1}, "weight_decay=-0.1 is out of bounds"),
    ({"optimizer.params.trust_clip": [10, 1]}, "trust_clip=[10, 1] must be (low, high)"),
    ({"optimizer.params.state_dtype": "fp16"}, "state_dtype='fp16' must be"),
    ({"optimizer.params.seed": 1.5}, "seed=1.5 must be a whole number"),
    ({"optimizer.params.bias_correction": 1}, "bias_correction=1 must be true or false"),
    ({"optimizer": ADAMW, "optimizer.params.lr": "0.1"}, 'lr="0.1" must be a number; write 0.1'),
    ({"optimizer": ADAMW, "optimizer.params.betas": [0.9]}, "must be a list of 2 numbers"),
    ({"optimizer": ADAMW, "optimizer.params.amsgrad": 1}, "amsgrad=1 must be true or false"),
    ({"optimizer": {"type": "SGD", "params": {"lr": -1}}}, "optimizer.params: Invalid learning ra"),
    ({"optimizer": ADAMW, "optimizer.params.lr": -1}, "params.lr=-1 must be a number >= 0"),
    ({"optimizer": {"type": "Muon", "params": {"muon_lr": "1"}}}, "write 1 without quotes"),
    ({"optimizer": E_ADAMW, "optimizer.params.optimizer": "Adamm"}, "'Adamm' names no optimizer"),
    ({"optimizer": E_ADAMW, "optimizer.params.alpha": 200}, "alpha=200 is out of bounds"),
    ({"optimizer": E_ADAMW, "optimizer.params.beta": 1.5}, "beta=1.5 is out of bounds"),
    ({"optimizer": E_ADAMW, "optimizer.params.lr": "x"}, 'optimizer.params.lr="x" must be a numb'),
    # scheduler
    ({"scheduler": []}, "--max_steps is needed"),
    ({"scheduler.type": "WarmupCosine"}, 'did you mean "WarmupCosineLR"?'),
    ({"scheduler.type": "math"}, 'scheduler.type="math" is none'),
    ({"scheduler.type": ["WarmupLR"]}, "scheduler.type"),
    ({"scheduler.params.total_num_steps": "300"}, "--max_steps is needed"),
    ({"scheduler.params.total_num_steps": 0}, "--max_steps is needed"),
    ({"scheduler.params.total_num_steps": True}, "--max_steps is needed"),
    ({"scheduler.params.warmup_num_steps": 20.0}, "warmup_num_steps=20.0 must be a whole number"),
    ({"scheduler.params.warmup_num_steps": 0}, "warmup_num_steps=0 must be at least 1"),
    ({"scheduler.params.warmup_num_steps": "20"}, "; write 20 without quotes"),
    ({"scheduler.params.cos_min_ratio": "0.1"}, 'cos_min_ratio="0.1" must be a number'),
    ({"scheduler.params.warmup_type": 1}, "scheduler.params.warmup_type=1 must be a string"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_JSON, ids=lambda value: str(value)[:60])
def test_a_wrong_json_is_refused_by_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(changes)))
    assert message in refused(capsys, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is no JSON"),
        (b"{", "it is no JSON"),
        (b'{"optimizer": {}', "it is no JSON"),
        (b"{'optimizer': {}}", "it is no JSON"),
        (b'{"a": 1,}', "it is no JSON"),
        (b"[]", "it is no JSON object, but []"),
        (b"null", "it is no JSON object, but null"),
        (b'"x"', 'it is no JSON object, but "x"'),
        (b'{"optimizer": "\xe9"}', "it is no UTF-8 text: byte 0xe9 at offset 15"),
        ("\ufeff{}".encode(), "it is no JSON"),
        ("{}".encode("utf-16"), "it is no UTF-8 text"),
        (b'{"optimizer": {}, "optimizer": {}}', "optimizer stands there twice; remove one"),
        (b'{"fp16": {"enabled": true, "enabled": false}}', "fp16.enabled stands there twice"),
        (b'{"x": [{"a": 1, "a": 2}]}', "x[0].a stands there twice"),
        (b'{"gradient_clipping": NaN}', "gradient_clipping=NaN must be finite"),
        (b'{"gradient_clipping": Infinity}', "gradient_clipping=Infinity must be finite"),
        (b'{"gradient_clipping": -Infinity}', "gradient_clipping=-Infinity must be finite"),
        (b'{"gradient_clipping": 1e999}', "gradient_clipping=Infinity must be finite"),
        (b'{"optimizer": {"params": {"lr": NaN}}}', "optimizer.params.lr=NaN must be finite"),
        (b'{"optimizer": {"params": {"betas": [0.9, NaN]}}}', "optimizer.params.betas[1]=NaN"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "it is nested too deeply"),
        (b'{"train_batch_size": ' + b"9" * 5000 + b"}", "it is no JSON"),
        (b'{"train_batch_size": 8}', 'has no "optimizer"'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_no_json_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    printed = refused(capsys, path)
    assert message in printed
    assert "--deepspeed_config" in printed


def test_a_json_without_batch_size_or_parts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for missing, message in (
        ("train_batch_size train_micro_batch_size_per_gpu", "train_batch_size is missing"),
        ("scheduler.type", "scheduler.type is missing"),
        ("optimizer.type", "optimizer.type is missing"),
        ("scheduler", "--max_steps is needed"),
    ):
        config = copy.deepcopy(CONFIG)
        for path in missing.split():
            *sections, key = path.split(".")
            del (config[sections[0]] if sections else config)[key]
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config))
        assert message in refused(capsys, file)
    for wrong, message in (
        ({"type": "WarmupLR"}, 'scheduler has no "params"'),
        ({"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}, 'has no "cycle_max_lr"'),
    ):
        file.write_text(json.dumps(CONFIG | {"scheduler": wrong}))
        assert message in refused(capsys, file, "--max_steps", "3")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": ADAMW},
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}},
        {"optimizer": {"type": "LAMB", "params": {"lr": 1e-3, "max_coeff": 10, "min_coeff": 0}}},
        {"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}}},
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "adam_lr": 1e-4}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 1, "momentum": 0.9}}},
        {"optimizer": E_ADAMW},
        {"optimizer": {"type": "E", "params": {"optimizer": "ALTO", "lr": 1e-2}}},
        {"optimizer.params.trust_clip": [0.01, 10], "optimizer.params.state_dtype": "bf16"},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}},
        {"zero_optimization.reduce_bucket_size": 5e8, "zero_optimization.overlap_comm": False},
        {"zero_optimization.stage3_prefetch_bucket_size": 1, "zero_optimization.stage": 3},
        {"zero_optimization.offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
        {"zero_optimization.leaf_module": {"classes": ["torch.nn.Linear"]}},
        {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}},
        {"bfloat16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"csv_monitor": {"enabled": True, "output_path": "x"}, "wall_clock_breakdown": True},
        {"flops_profiler": {"enabled": True, "module_depth": -1}, "timers": {"throughput": {}}},
        {"checkpoint": {"tag_validation": "Fail"}, "aio": {"queue_depth": 4}},
        {
            "gradient_clipping": 0,
            "communication_data_type": "fp32",
            "seq_parallel_communication_data_type": "fp32",
        },
    ],
    ids=str,
)
def test_a_right_json_is_taken_and_not_changed(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, config = tmp_path / "config.json", changed(changes)
    path.write_text(json.dumps(config))
    read = read_deepspeed_json(path)
    check_values(read)
    assert read == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_step_count", "3"], "--max_step_count is no option; did you mean --max_steps?"),
        (["--seqlength", "3"], "did you mean --seq_length?"),
        (["--output=x", "--textt", "a"], "did you mean --text?"),
        (["--zzz=1"], "--zzz is no option; --help lists all options"),
        (["stray"], "stray is no option"),
        (["--max_steps", "ten"], "argument --max_steps: invalid int value: 'ten'"),
        (["--max_steps", "1.5"], "invalid int value: '1.5'"),
        (["--max_steps", "-1"], "--max_steps=-1 must be at least 1"),
        (["--max_steps", str(10**30)], "must be at most"),
        (["--max_steps"], "expected one argument"),
        (["--dropout", "nan"], "--dropout=nan must be in [0, 1)"),
        (["--dropout", "-0.1"], "--dropout=-0.1 must be in [0, 1)"),
        (["--validation_fraction", "nan"], "--validation_fraction=nan must be in"),
        (["--validation_fraction", "0"], "--validation_fraction=0.0 must be in"),
        (["--seq_length", "100000"], "gpt2-tiny takes 128 tokens at most"),
        (["--seed", "-1"], "--seed=-1 must be at least 0"),
        (["--seed", str(2**64)], "must be at most"),
        (["--timeout", str(10**12)], "must be at most"),
        (["--eval_interval", "0"], "--eval_interval=0 must be at least 1"),
        (["--save_interval", "-5"], "--save_interval=-5 must be at least 1"),
        (["--vocab_size", "0"], "--vocab_size=0 must be at least 257"),
        (["--model", "gpt5"], "--model=gpt5 must be one of gpt2-tiny, gpt2, "),
        (["--text"], "expected at least one argument"),
        (["--text", "a", "--encoding", "utf8x"], "--encoding=utf8x is none of text"),
        (["--text", "a", "--encoding", "base64"], "--encoding=base64 is none of text"),
        (["--encoding", "latin-1"], "--encoding=latin-1 is that of --text"),
        (["--dataset", ""], "--dataset is empty"),
        (["--dataset", "d", "--text_column", ""], "--text_column is empty"),
        (["--output_dir", __file__], "is a file; name a folder"),
        (["--deepspeed_config", str(ROOT)], "is no file"),
        (["--deepspeed_config", ""], "is no file"),
        (
            ["--text", "caf\udce9.txt"],
            "'caf\\udce9.txt' is no UTF-8 text; rename that file or fold",
        ),
        (["--output_dir", "\udcff"], "'\\udcff' is no UTF-8 text; rename that file or folder"),
        (["--dataset", "a\0b"], "'a\\x00b' is no UTF-8 text"),
        (["--max_steps", ""], "argument --max_steps: invalid int value: ''"),
        (["--max_steps", "9" * 5000], "argument --max_steps: invalid int value: '999"),
        (["--save_minutes", "nan"], "--save_minutes=nan must be above 0"),
        (["--save_minutes", "0"], "--save_minutes=0.0 must be above 0"),
        (["--save_minutes", "ten"], "argument --save_minutes: invalid float value: 'ten'"),
        (["--keep_checkpoints", "0"], "--keep_checkpoints=0 must be at least 1"),
        (["--keep_every", "0"], "--keep_every=0 must be at least 1"),
        (["--max_skipped_steps", "-1"], "--max_skipped_steps=-1 must be at least 1"),
        (["--timeout", "0"], "--timeout=0 must be at least 1"),
        (["--tokenizer", ""], "--tokenizer is empty"),
        (["--dataset_split", ""], "--dataset_split is empty"),
        (["--local_rank", "x"], "argument --local_rank: invalid int value: 'x'"),
        (["--streaming"], "--streaming goes with --dataset"),
        (["--text", "a", "--dataset", "b"], "--text and --dataset both name text"),
        (["--seq_length", "1"], "--seq_length=1 must be at least 2"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_option_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, TINY, *arguments)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelSettings, {"seq_length": "64"}, "--seq_length='64' must be a whole number"),
        (ModelSettings, {"seq_length": True}, "--seq_length=True must be a whole number"),
        (ModelSettings, {"dropout": "0.1"}, "--dropout='0.1' must be a number"),
        (DataSettings, {"vocab_size": 400.0}, "--vocab_size=400.0 must be a whole number"),
        (DataSettings, {"validation_fraction": None}, "--validation_fraction=None must be a numb"),
        (RunSettings, {"seed": "1"}, "--seed='1' must be a whole number"),
        (RunSettings, {"max_steps": 2.5}, "--max_steps=2.5 must be a whole number"),
    ],
)
def test_a_setting_made_in_python_of_another_kind_is_refused(
    kind: Any, values: dict[str, Any], message: str
) -> None:
    required: dict[Any, Any] = {
        ModelSettings: {"model": "gpt2"},
        RunSettings: {"output_dir": Path("out")},
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**required.get(kind, {}), **values)


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"\x7fELF\x02\x01\x01\x00\x00", "utf-8", "is no text: NUL at byte 7"),
        (b"some text\x00and more", "utf-8", "is no text: NUL at byte 9"),
        ("caf\xe9\x00".encode(), "utf-8", "is no text: NUL at byte 5"),
        ("some text".encode("utf-16"), "utf-8", "is UTF-16, by its mark at byte 0; write --enc"),
        (b"\xfe\xff\x00a", "utf-8", "is UTF-16, by its mark at byte 0"),
        ("some text".encode("utf-32"), "utf-8", "is UTF-32, by its mark at byte 0"),
        ("some text".encode("utf-16-le"), "utf-8", "NUL at byte 1. Leave it out if it is binary"),
        ("some text".encode("utf-16-be"), "utf-8", "NUL at byte 0. "),
        (
            "a caf\xe9".encode("latin-1"),
            "utf-8",
            "is not utf-8: byte 0xe9 at offset 5; name its en",
        ),
        (b"x" * 30_000 + b"\xff", "utf-8", "byte 0xff at offset 30000"),
        (b"cut \xe2\x82", "utf-8", "byte 0xe2 at offset 4"),
        (b"\x1f\x8b\x08\x00zip", "utf-8", "byte 0x8b at offset 1"),
        ("caf\xe9".encode(), "ascii", "is not ascii: byte 0xc3 at offset 3"),
        (b"odd", "utf-16-le", "is not utf-16-le"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_text_is_refused_by_its_first_wrong_byte(
    tmp_path: Path, content: bytes, encoding: str, message: str
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("good text", encoding=encoding)
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.txt") as error:
        documents(DataSettings(text=[good, bad], encoding=encoding))
    assert message in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_in_its_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("caf\xe9\r\n\u20ac".encode(encoding))
    rows = documents(DataSettings(text=[path], encoding=encoding))
    assert rows["text"][:] == ["caf\xe9\n\u20ac"]


def test_a_folder_as_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--text names folders"):
        documents(DataSettings(text=[tmp_path]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 3 is no JSON"),
        (b'{"text": "a"} {"text": "b"}', "line 3 is no JSON"),
        (b"plain words", "line 3 is no JSON"),
        (b"\x00\x00\x00", "line 3 is no JSON"),
        (b'{"text": ' + b"[" * 100_000, "line 3 is no JSON"),
        (b'["text"]', "line 3 is no JSON object"),
        (b'"text"', "line 3 is no JSON object"),
        (b'{"txt": "a"}', "--text_column=text is not in "),
        (b"{}", "has the columns (none)"),
        (b'{"text": 3}', "--text_column=text holds 3 in "),
        (b'{"text": ["a"]}', '--text_column=text holds ["a"] in '),
        (b'{"text": {"a": "b"}}', "--text_column=text holds {"),
        (b'{"text": true}', "--text_column=text holds true in "),
        (b'{"text": "caf\xe9"}', "line 3 is not UTF-8: byte 0xe9 at offset 13 of the line"),
        (b'{"text": "\\ud800"}', "line 3 holds half a surrogate pair"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_broken_json_line_is_refused_by_its_number(
    tmp_path: Path, line: bytes, message: str, streaming: bool
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 3") as error:
        documents(DataSettings(dataset=str(path), streaming=streaming))
    assert message in str(error.value)


def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"--dataset=.*empty\.jsonl has no lines"):
        documents(DataSettings(dataset=str(empty)))
    broken = tmp_path / "broken.json"
    broken.write_text('[{"text": "cut')
    for name in (str(broken), str(tmp_path)):
        with pytest.raises(ValueError, match=r"--dataset=.* cannot be loaded") as error:
            documents(DataSettings(dataset=name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"seed": ', b"[]", b"null", b"\xff\xfe", b"[" * 100_000, None]
)
def test_a_broken_identity_is_named_with_its_remedy(tmp_path: Path, content: bytes | None) -> None:
    write_identity(tmp_path, {"seed": 1})
    check_identity(tmp_path, {"seed": 1})
    if content is None:
        (tmp_path / FILE).unlink()
    else:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json, which says .* cannot be read: .* --output_"):
        check_identity(tmp_path, {"seed": 1})


@pytest.mark.parametrize(
    "broken",
    [
        b'{"step": 2, "loss": 1.0, "l',
        b"",
        b"\x00" * 40,
        b"\xff\xfe",
        b"3",
        b"[]",
        b'{"loss": 1.0, "lr": 0.1}',
        b'{"step": "2", "loss": 1.0, "lr": 0.1}',
        b'{"step": 2, "loss": null, "lr": 0.1}',
        b'{"step": 2, "loss": "low", "lr": 0.1}',
        b"[" * 100_000,
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_broken_line_of_the_metrics_loses_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: bytes
) -> None:
    rows = [{"step": step, "loss": float("nan"), "lr": 0.1} for step in (1, 3, 4)]
    lines = [json.dumps(row).encode() for row in rows]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([lines[0], broken, *lines[1:], b'{"step": 5, "lo']))
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4]
    metrics = Metrics(tmp_path, 3, 9, active=True)
    assert "left out line 2, which cannot be read; kept the other 3" in capsys.readouterr().err
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that a run has trained."""
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    trained(folder, resumed=False)
    return folder


def trained(folder: Path, resumed: bool) -> Any:
    text = [{"text": "some words to learn from " * 20}]
    return make_tokenizer(DataSettings(vocab_size=300), text, "of text", folder, resumed)


@pytest.mark.parametrize("cut", [None, 0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "trained_on.json"])
def test_a_broken_tokenizer_is_named_and_before_a_checkpoint_trained_anew(
    tmp_path: Path, tokenizer: Path, name: str, cut: float | None
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    whole = (folder / name).read_bytes()
    if cut is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[: int(len(whole) * cut)])
    expected = trained(tokenizer, resumed=True)
    with pytest.raises(ValueError, match=r"the tokenizer that .* is broken: ") as error:
        trained(folder, resumed=True)
    assert "start anew with another --output_dir" in str(error.value)
    assert "\n" not in str(error.value)
    again = trained(folder, resumed=False)
    assert again.get_vocab() == expected.get_vocab()
    assert trained(folder, resumed=True).get_vocab() == expected.get_vocab()


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    for name in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(ValueError, match=f"--tokenizer={name} cannot be loaded: ") as error:
            make_tokenizer(DataSettings(tokenizer=name), [], "", tmp_path, resumed=False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("json", 'config.json: zero_optimisation is not known to DeepSpeed; did you mean "zero_op'),
        ("batch", "DeepSpeed refuses the JSON: Check batch related parameters"),
        (
            "micro",
            "train_batch_size=8 is not a multiple of train_micro_batch_size_per_gpu=3 times 2",
        ),
        ("heads", "--n_embd=100 must be a multiple of --n_head=3"),
        ("text", "bad.txt is UTF-16, by its mark at byte 0; write --encoding utf-16"),
    ],
)
def test_bad_input_ends_two_ranks_with_one_line(
    tmp_path: Path, forks: Forks, wrong: str, message: str
) -> None:
    arguments = options(tmp_path, "output")
    path = tmp_path / "config.json"
    config = json.loads((tmp_path / "zero2.json").read_text())
    bad = tmp_path / "bad.txt"
    bad.write_bytes("words ".encode("utf-16"))
    if wrong == "json":
        config["zero_optimisation"] = {"stage": 1}
    if wrong == "batch":
        config["gradient_accumulation_steps"] = 3
    if wrong == "micro":
        config["train_micro_batch_size_per_gpu"] = 3
    path.write_text(json.dumps(config))
    arguments += [str(bad)] if wrong == "text" else []
    arguments += ["--n_embd", "100", "--n_head", "3"] if wrong == "heads" else []
    ranks = forks.start(2, *arguments, "--deepspeed_config", str(path))
    assert forks.wait(ranks, 100) == [2, 2]
    first, second = (rank.log.read_text() for rank in ranks)
    assert first.count(message) == 1
    assert "Traceback" not in first + second
    assert message not in second


def test_a_run_says_with_which_settings_it_trains(straight: str) -> None:
    for line in (
        "model: model=gpt2-tiny, seq_length=32, dropout=0.1",
        "vocab_size=400",
        "max_steps=12, eval_interval=5, save_interval=5",
        "batches: train_batch_size=8, train_micro_batch_size_per_gpu=2, "
        "gradient_accumulation_steps=2, ranks=2",
        "numbers: bf16=False, fp16=False, zero_optimization.stage=2, gradient_clipping=1.0",
        "schedule: type=WarmupCosineLR, total_num_steps=12, warmup_num_steps=2",
        "ALTO, group 0: ",
        "ALTO, group 1: ",
        "betas=[0.99, 0.9, 0.99], alpha=-5.0",
    ):
        assert straight.count(line) >= 1, line
    assert straight.count("model: model=") == 1  # rank 0's


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "2", "cpu", "ALTO", "AdamW", "E", "WarmupLR", 10**40, -1, 0, 1e308]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("gradient_clipping", "optimizer", "optimizer.type", "optimizer.params", "scheduler"),
        *("optimizer.params.lr", "optimizer.params.betas", "optimizer.params.alpha"),
        *("optimizer.params.eps", "optimizer.params.optimizer", "optimizer.params.trust_clip"),
        *("scheduler.type", "scheduler.params", "scheduler.params.total_num_steps"),
        *("scheduler.params.warmup_num_steps", "scheduler.params.cos_min_ratio"),
        *("zero_optimization", "zero_optimization.stage", "zero_optimization.offload_optimizer"),
        *("zero_optimization.offload_optimizer.device", "zero_optimization.zenflow", "fp16"),
        *("zero_optimization.sub_group_size", "zero_optimization.leaf_module", "fp16.enabled"),
        *("fp16.loss_scale", "bf16", "bf16.enabled", "bfloat16", "torch_autocast", "aio"),
        *("torch_autocast.dtype", "torch_autocast.enabled", "data_types", "checkpoint"),
        *("data_types.grad_accum_dtype", "checkpoint.tag_validation", "checkpoint.writer"),
        *("flops_profiler", "timers", "timers.throughput", "compile", "compile.passes"),
        *("communication_data_type", "tensor_parallel", "pipeline", "data_efficiency"),
        *("expert_parallel", "weight_quantization", "hybrid_engine", "comms_logger", "autotuning"),
        *("tensorboard", "log_level", "datastates_ckpt", "steps_per_print", "vocabulary_size"),
    ]
)
FUZZED = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def outcome(*arguments: str) -> None:
    """Parse a command line, which may end with exit status 2 and with nothing else."""
    try:
        parse_arguments(list(arguments))
    except SystemExit as end:
        assert end.code in (0, 2)  # noqa: PT017  0 is that of --help


@FUZZED
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4), st.booleans())
def test_fuzzed_json_values_are_taken_or_refused(
    tmp_path: Path, changes: dict[str, Any], with_steps: bool
) -> None:
    try:
        config = changed(changes)
    except (AttributeError, TypeError):
        return  # one change has put a value where another needs a section
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    steps = ["--max_steps", "3"] if with_steps else []
    required = ["--model", "gpt2-tiny", "--output_dir", "out", "--deepspeed_config", str(path)]
    outcome(*required, *steps)


@FUZZED
@given(CHANCES)
def test_fuzzed_bytes_of_a_json_are_taken_or_refused(tmp_path: Path, chance: Random) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(mutated(TINY.read_bytes(), chance))
    outcome("--model", "gpt2-tiny", "--output_dir", "out", "--deepspeed_config", str(path))


@FUZZED
@given(CHANCES)
def test_fuzzed_bytes_of_an_identity_are_taken_or_refused(tmp_path: Path, chance: Random) -> None:
    write_identity(tmp_path, {"seed": 1, "text": "of text"})
    path = tmp_path / FILE
    path.write_bytes(mutated(path.read_bytes(), chance))
    with contextlib.suppress(ValueError):
        check_identity(tmp_path, {"seed": 1, "text": "of text"})


@FUZZED
@given(CHANCES)
def test_fuzzed_bytes_of_the_metrics_lose_no_other_line(tmp_path: Path, chance: Random) -> None:
    lines = [json.dumps({"step": step, "loss": 2.5, "lr": 0.1}).encode() for step in range(1, 6)]
    broken = chance.randrange(5)
    others = [step for step in range(1, 6) if step != broken + 1]
    lines[broken] = mutated(lines[broken], chance).replace(b"\n", b"")
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = [row["step"] for row in read_metrics(path)]
    assert set(others) <= set(found)  # one bit makes step 5 a step 4, which nobody can see


@FUZZED
@given(CHANCES)
def test_fuzzed_bytes_of_a_tokenizer_are_taken_or_refused(
    tmp_path: Path, tokenizer: Path, chance: Random
) -> None:
    folder = tmp_path / "tokenizer"
    if not folder.exists():
        shutil.copytree(tokenizer, folder)
    name = chance.choice(["tokenizer.json", "tokenizer_config.json"])
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(mutated(whole, chance))
    try:
        trained(folder, resumed=True)
    except ValueError as error:
        assert "the tokenizer that the run was started with is broken: " in str(error)  # noqa: PT017
    finally:
        (folder / name).write_bytes(whole)


OPTIONS = st.sampled_from(
    [
        *("--model", "--output_dir", "--text", "--encoding", "--dataset", "--dataset_config"),
        *("--dataset_split", "--text_column", "--streaming", "--validation_fraction"),
        *("--validation_sequences", "--tokenizer", "--vocab_size", "--tokenizer_documents"),
        *("--seq_length", "--max_steps", "--eval_interval", "--save_interval", "--dropout"),
        *("--seed", "--timeout", "--local_rank", "--deepspeed", "--deepspeed_config", "--help"),
        *("--save_minutes", "--max_skipped_steps", "--keep_checkpoints", "--keep_every"),
    ]
)
WORDS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Ll"]), max_size=4),
    st.sampled_from(["gpt2", "latin-1", "undefined", "hex", "idna", "-1", "--", "9" * 5000]),
)


@FUZZED
@given(st.lists(st.tuples(OPTIONS, st.lists(WORDS, max_size=2)), max_size=5))
def test_fuzzed_command_lines_are_taken_or_refused(
    options: list[tuple[str, list[str]]],
) -> None:
    arguments = [word for option, words in options for word in (option, *words)]
    outcome(
        *("--model", "gpt2-tiny", "--output_dir", "out", "--deepspeed_config", str(TINY)),
        *arguments,
    )


@FUZZED
@given(st.lists(st.binary(max_size=30) | VALUES.map(lambda v: json.dumps({"text": v}).encode())))
def test_fuzzed_json_lines_are_read_or_refused(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    settings = DataSettings(dataset=str(path), streaming=True)
    try:
        list(documents(settings))
    except ValueError as error:
        assert "lines.jsonl, line " in str(error) or "has no lines" in str(error)  # noqa: PT017
