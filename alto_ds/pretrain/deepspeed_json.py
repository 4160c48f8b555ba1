"""What is wrong with a DeepSpeed JSON?

DeepSpeed takes no notice of a key that it does not know, at the top level and in some sections,
and turns ``"2"`` into 2. Here such things are errors. What is known comes from DeepSpeed: from its
own models of sections, and, where a section has none, from the keys that its reader asks for.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import typing
from collections import Counter, UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, HybridEngineConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError
from torch.optim import Optimizer

import alto_ds
from alto_ds.registration import fill_in_auto

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "hybrid_engine": HybridEngineConfig,
    "compile": CompileConfig,
    "weight_quantization": WeightQuantConfig,
    "tensor_parallel": TPTrainingConfig,
}
# Sections without a model, whose keys the reader asks for by name.
SECTIONS = (
    *("optimizer", "scheduler", "torch_autocast", "activation_checkpointing", "flops_profiler"),
    *("autotuning", "aio", "data_types", "checkpoint", "timers"),
)
# Keys that DeepSpeed reads elsewhere: runtime/config.py's checks, deepspeed.initialize.
ELSEWHERE = ("vocabulary_size", "sequence_parallel_size", "data_parallel_size")
# DeepSpeed's defaults of these are None, which does not tell their kind.
COUNTS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("steps_per_print", *ELSEWHERE),
)
# What DeepSpeed's engine takes out of the params of Adam, AdamW and Muon before it makes them.
ADAM_EXTRAS = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True}
ANY = None  # the default of a key of which nothing more is known


@dataclasses.dataclass(frozen=True)
class Section:
    """A section that DeepSpeed knows.

    Attributes:
        keys: what may stand in it: a section, or the default of a value, of which a value's kind
            is known. The default ``{}`` is that of a section that may hold any keys.
    """

    keys: dict[str, Any]


class _WrongValueError(ValueError):
    """What is wrong in text that is JSON."""


class _Asked(UserDict[str, Any]):
    """A section that remembers which keys it was asked for, and with which defaults."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.keys_asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.setdefault(key, default)
        return self.data.get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.setdefault(key, ANY)
        return self.data[key]

    def __contains__(self, key: object) -> bool:
        self.keys_asked.setdefault(str(key), ANY)
        return key in self.data


class _Object(dict[str, Any]):
    """An object of a JSON, and a key that stands in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: str | None = None
        if len(self) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.repeated = counts.most_common(1)[0][0]


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; every key in it is known, stands there once, and no number is NaN.

    Raises:
        ValueError: names the file, or the key by its path such as ``zero_optimization.stage``.
    """
    try:
        text = path.read_bytes().decode()
        parsed = _plain(json.loads(text, object_pairs_hook=_Object), "")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is no UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}; "
            "save it as UTF-8"
        ) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except _WrongValueError:
        raise
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"it is no JSON object, but {_shown(parsed)}; write it in braces")
    _check_keys(parsed, _known(), "")
    return parsed


def check_values(config: dict[str, Any]) -> None:
    """See that values are of the kind that DeepSpeed expects, and that optimizer and scheduler fit.

    Raises:
        ValueError: names the key by its path, its value, and what to write instead.
    """
    config = _without_auto(config)
    _check_section(config, _known(), "")
    with _without_warnings():
        _check_parts(config)


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """The JSON with numbers for the "auto" of ALTO and E, to be checked as they will be used.

    Where the global batch depends on the number of ranks any will do, for all numbers are right.
    """
    section = config.get("optimizer")
    if not isinstance(section, dict) or section.get("type") not in ("ALTO", "E"):
        return config
    params, batch_size = section.get("params"), config.get("train_batch_size")
    if not isinstance(params, dict):
        return config
    size = batch_size if isinstance(batch_size, int) else 1000
    return config | {
        "optimizer": section | {"params": fill_in_auto(section["type"], params, lambda: size)}
    }


def _check_parts(config: dict[str, Any]) -> None:
    for name, model in MODELS.items():
        if name in config:
            _check_model(config[name], model, name)
    throughput = config.get("timers", {}).get("throughput", {})
    _check_model(throughput, DeepSpeedThroughputTimerConfig, "timers.throughput")
    for name in COUNTS:
        if name in config and (type(config[name]) is not int or config[name] < 1):
            raise _kind_error(name, config[name], "a whole number of at least 1")
    if config.get("gradient_clipping", 1.0) < 0:
        raise _kind_error("gradient_clipping", config["gradient_clipping"], "a number >= 0")
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & config.keys():
        raise ValueError(
            "train_batch_size is missing; write the number of sequences in a global batch, "
            'such as "train_batch_size": 32'
        )
    _check_optimizer(config)
    if "scheduler" in config:
        _check_scheduler(config["scheduler"])
    _ask_deepspeed(config)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Let DeepSpeed warn once, when it makes the engine, not when its parts are only tried."""
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _plain(value: Any, path: str) -> Any:
    """A parsed JSON of plain dictionaries; raises where a key is repeated, or a number infinite."""
    if isinstance(value, _Object):
        if value.repeated is not None:
            raise _WrongValueError(f"{_join(path, value.repeated)} stands there twice; remove one")
        return {key: _plain(inner, _join(path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, f"{path}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise _WrongValueError(f"{path}={_shown(value)} must be finite; write a number")
    return value


def _check_keys(section: Mapping[str, Any], known: Section, path: str) -> None:
    for key, value in section.items():
        if key not in known.keys:
            raise _unknown(key, known.keys, path, "DeepSpeed")
        inner = known.keys[key]
        if isinstance(inner, Section) and isinstance(value, dict):
            _check_keys(value, inner, _join(path, key))


def _unknown(key: str, known: Iterable[str], path: str, taker: str) -> ValueError:
    """What to raise for a key that is not among ``known``, which are those of ``taker``."""
    full, known = _join(path, key), list(known)
    if not path:
        try:
            deepspeed_config._reject_removed_config_keys({key: ANY})
        except deepspeed_config.DeepSpeedConfigError as error:
            return ValueError(f"{full}: {_one_line(error)}")
    if key == "max_grad_norm":
        return ValueError(f'{full} is not taken by DeepSpeed; write "gradient_clipping" beside it')
    homes = [name for name, inner in _known().keys.items() if _has(inner, key)]
    near = difflib.get_close_matches(key.lower(), known, n=1)
    remedy = f'did you mean "{near[0]}"?' if near else "remove it"
    if not near and len(homes) == 1:
        remedy = f'it belongs in "{homes[0]}"'
    elif not near and len(known) <= 20:
        remedy = f"known are {', '.join(known)}"
    return ValueError(f"{full} is not known to {taker}; {remedy}")


def _has(inner: Any, key: str) -> bool:
    return isinstance(inner, Section) and key in inner.keys


def _check_section(section: Any, known: Section, path: str) -> None:
    """See that values have the kinds of their defaults, and that none is null or "auto"."""
    for key, value in section.items():
        full, default = _join(path, key), known.keys.get(key, ANY)
        if isinstance(default, Section) and isinstance(value, dict):
            _check_section(value, default, full)
            continue
        _refuse_null_and_auto(value, default, full)
        if isinstance(default, Section):
            raise _kind_error(full, value, "an object in braces")
        if full.split(".")[0] not in MODELS:  # which pydantic checks
            _check_kind(full, value, default)


def _refuse_null_and_auto(value: Any, default: Any, path: str) -> None:
    if value is None:
        raise ValueError(f"{path}=null: write a value, or leave it out for the default")
    if value == "auto" and default != "auto":
        raise ValueError(
            f'{path}="auto" is for Hugging Face Trainer, which fills it in; write a value, or '
            "leave it out for the default"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_null_and_auto(inner, ANY, _join(path, key))
    if isinstance(value, list):
        for i, inner in enumerate(value):
            _refuse_null_and_auto(inner, ANY, f"{path}[{i}]")


def _check_kind(path: str, value: Any, default: Any) -> None:
    """See that a value is of the kind of a default."""
    if isinstance(default, bool):  # first, for Python's bools are ints
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, kind = type(value) is int, "a whole number"
    elif isinstance(default, float):
        fits, kind = type(value) in (int, float), "a number"
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "a string"
    elif isinstance(default, tuple) and all(type(number) is float for number in default):
        fits = isinstance(value, list) and all(type(number) in (int, float) for number in value)
        fits, kind = fits and len(value) == len(default), f"a list of {len(default)} numbers"
    elif isinstance(default, list | tuple):
        fits, kind = isinstance(value, list), "a list"
    elif isinstance(default, Mapping):
        fits, kind = isinstance(value, dict), "an object in braces"
    else:
        return
    if not fits:
        raise _kind_error(path, value, kind)


def _kind_error(path: str, value: Any, kind: str) -> ValueError:
    unquoted = ""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            unquoted = f"; write {json.dumps(json.loads(value.lower()))} without quotes"
    return ValueError(f"{path}={_shown(value)} must be {kind}{unquoted}")


def _check_model(section: dict[str, Any], model: type[BaseModel], path: str) -> None:
    """Let a model of DeepSpeed's check a section, then see what it has turned into another kind."""
    try:
        taken = model(**section)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([path, *map(str, first["loc"])])
        # It lists ZeRO's stages with the last one twice.
        message = re.sub(r"(\S+) or \1$", r"\1", first["msg"].replace("Input should", "must"))
        raise ValueError(f"{name}={_shown(first['input'])}: {_one_line(message)}") from None
    except Exception as error:  # what DeepSpeed raises of deprecated keys is of several kinds
        raise ValueError(f"{path}: {_one_line(error)}") from None
    _refuse_conversions(section, taken, path)


def _refuse_conversions(section: dict[str, Any], taken: BaseModel, path: str) -> None:
    names = {field.alias or name: name for name, field in type(taken).model_fields.items()}
    for key, given in section.items():
        value = getattr(taken, names.get(key, key), ANY)  # deprecated ones are gone
        full = _join(path, key)
        if isinstance(value, BaseModel) and isinstance(given, dict):
            _refuse_conversions(given, value, full)
        elif isinstance(value, bool) and not isinstance(given, bool):
            raise _kind_error(full, given, "true or false")
        elif (
            isinstance(value, int | float)
            and isinstance(given, str | bool)
            and not (isinstance(value, bool))
        ):
            raise _kind_error(full, given, "a number")


def _check_optimizer(config: dict[str, Any]) -> None:
    section = config.get("optimizer", {})
    params = section.get("params", {})
    classes = [name for name, value in vars(torch.optim).items() if _is_optimizer(value)]
    kind = _check_type(section, "optimizer", [*DEEPSPEED_OPTIMIZERS, *classes], "ALTO")
    _check_kind("optimizer.params", params, {})
    if kind.lower() in DEEPSPEED_OPTIMIZERS:
        known, make = _of_deepspeed(kind.lower(), params, config), None
    else:
        make = inspect.unwrap(getattr(torch.optim, kind))
        known = _defaults(make)
        if make is alto_ds.from_config:
            base = getattr(torch.optim, str(params.get("optimizer", "AdamW")), None)
            known |= _defaults(base) if _is_optimizer(base) else dict.fromkeys(params)
    _check_params("optimizer.params", params, known, kind, check_kinds=make is not alto_ds.ALTO)
    for name in ("lr", "eps", "weight_decay", "muon_lr", "adam_lr"):
        if make is None and params.get(name, 0.0) < 0:  # FusedAdam and others take anything
            raise _kind_error(f"optimizer.params.{name}", params[name], "a number >= 0")
    if make is not None:
        _try("optimizer.params", make, [torch.nn.Parameter(torch.zeros(2, 2))], params)


def _of_deepspeed(kind: str, params: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Parameters, with defaults, of the class that DeepSpeed makes of a type of its own."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    zero = config.get("zero_optimization", {})
    on_cpu = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if kind in ("adam", "adamw"):
        made = DeepSpeedCPUAdam if on_cpu else FusedAdam
        made = torch.optim.AdamW if params.get("torch_adam") is True else made
        return _defaults(made) | ADAM_EXTRAS
    if kind == "muon":
        halves = (*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS)
        numbers: dict[str, Any] = dict.fromkeys((*halves, "muon_lr", "adam_lr"), 0.0)
        return numbers | {"betas": (0.9, 0.999), "ns_method": ""} | ADAM_EXTRAS
    others: dict[str, Any] = {
        "adagrad": DeepSpeedCPUAdagrad if on_cpu else torch.optim.Adagrad,
        "lamb": FusedLamb,
        "lion": DeepSpeedCPULion if on_cpu else FusedLion,
    }
    # Those of the package mup, which need not be there.
    return _defaults(others[kind]) if kind in others else dict.fromkeys(params)


def _check_scheduler(section: dict[str, Any]) -> None:
    params = section.get("params")
    of_torch = [
        name
        for name, value in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.lr_scheduler.LRScheduler)
    ]
    known_types = [*lr_schedules.VALID_LR_SCHEDULES, *of_torch]
    kind = _check_type(section, "scheduler", known_types, lr_schedules.WARMUP_COSINE_LR)
    if params is None:
        raise ValueError(f'scheduler has no "params"; write those of {kind}, or "params": {{}}')
    _check_kind("scheduler.params", params, {})
    make = getattr(lr_schedules, kind, None) or getattr(torch.optim.lr_scheduler, kind)
    known = _defaults(make)
    _check_params("scheduler.params", params, known, kind, whole_numbers=True)
    for name in ("total_num_steps", "warmup_num_steps"):
        if name in params and params[name] < 1:
            raise _kind_error(f"scheduler.params.{name}", params[name], "at least 1")
    for name, parameter in inspect.signature(make).parameters.items():
        if name in known and parameter.default is parameter.empty and name not in params:
            raise ValueError(f'scheduler.params has no "{name}", which {kind} needs; add it')
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    _try("scheduler.params", make, optimizer, params)


def _check_type(section: dict[str, Any], path: str, known: list[str], example: str) -> str:
    """The type of a section, which must be one of ``known``; DeepSpeed's own in any case."""
    kind = section.get("type")
    if kind is None:
        raise ValueError(f'{path}.type is missing; write one, such as "type": "{example}"')
    if isinstance(kind, str) and (kind in known or kind.lower() in DEEPSPEED_OPTIMIZERS):
        return kind
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(kind).lower(), names, n=1)
    remedy = f'did you mean "{names[near[0]]}"?' if near else f"known are {', '.join(known)}"
    raise ValueError(f"{path}.type={_shown(kind)} is none that DeepSpeed can make; {remedy}")


def _check_params(
    path: str,
    params: dict[str, Any],
    known: dict[str, Any],
    taker: str,
    *,
    check_kinds: bool = True,
    whole_numbers: bool = False,
) -> None:
    """See that keyword arguments are known and of the kind of their defaults.

    Args:
        path: of ``params`` in the JSON.
        params: the arguments.
        known: names and defaults.
        taker: whose arguments they are.
        check_kinds: False where whoever takes the arguments checks them better.
        whole_numbers: whether a default that is a whole number admits only such.
    """
    for name, value in params.items():
        if name not in known:
            raise _unknown(name, known, path, taker)
        default = known[name]
        if type(default) is int and not whole_numbers:
            default = float(default)
        if check_kinds:
            _check_kind(_join(path, name), value, default)


def _defaults(make: Any) -> dict[str, Any]:
    """Names and defaults of the keyword arguments of an optimizer or a scheduler."""
    found = {}
    for name, parameter in list(inspect.signature(make).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        without = parameter.default is parameter.empty
        is_count = parameter.annotation is int or parameter.annotation == "int"
        found[name] = (1 if is_count else ANY) if without else parameter.default
    return found


def _try(path: str, make: Callable[..., Any], first: Any, params: dict[str, Any]) -> None:
    """Make what the JSON names, of something small."""
    try:
        make(first, **params)
    except Exception as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None


def _is_optimizer(value: Any) -> bool:
    value = inspect.unwrap(value)
    is_class = inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    return is_class or value is alto_ds.from_config


def _ask_deepspeed(config: dict[str, Any]) -> None:
    """Let DeepSpeed read the JSON; what depends on the number of ranks is not checked there."""
    try:
        _read_by_deepspeed(copy.deepcopy(config))  # which it adds to
    except Exception as error:  # assertions, pydantic's and its own
        raise ValueError(f"DeepSpeed cannot read it: {_one_line(error)}") from None


def _read_by_deepspeed(config: Mapping[str, Any]) -> None:
    reader = DeepSpeedConfig.__new__(DeepSpeedConfig)  # __init__ would ask for the ranks
    reader._initialize_params(config)


@functools.cache
def _known() -> Section:
    """All that DeepSpeed knows."""
    top = _Asked({})
    _read_by_deepspeed(top)
    keys = top.keys_asked | dict.fromkeys(ELSEWHERE)
    for name in SECTIONS:
        # Without a type it would ask an optimizer for nothing more.
        section = _Asked({"type": ""} if name in ("optimizer", "scheduler") else {})
        _read_by_deepspeed(_Asked({name: section}))
        keys[name] = Section(section.keys_asked)
    keys["optimizer"].keys["params"] = keys["scheduler"].keys["params"] = {}
    keys["timers"].keys["throughput"] = _section_of(DeepSpeedThroughputTimerConfig)
    return Section(keys | {name: _section_of(model) for name, model in MODELS.items()})


def _section_of(model: type[BaseModel]) -> Section:
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        inner = [k for k in kinds if inspect.isclass(k) and issubclass(k, BaseModel)]
        keys[name] = keys[field.alias or name] = _section_of(inner[0]) if inner else field.default
    return Section(keys)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shown(value: Any) -> str:
    """A value as the JSON has it, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
