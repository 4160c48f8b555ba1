"""What must resuming a run not change?"""

from __future__ import annotations

import contextlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alto_ds.files import replace_text
from alto_ds.pretrain.settings import Settings

# Sections of DeepSpeed's JSON that decide the weights; others are asked of the engine.
DECISIVE = ("optimizer", "scheduler", "torch_autocast")
# What may change, for the checkpoint is converted then.
CONVERTED = ("bf16", "fp16", "ranks", "zero_optimization.stage")
# What may change, for it decides whether a run goes on, but not the weights of one that does.
FREE = ("optimizer.params.nonfinite",)
OF_STATES = ("optimizer", "scheduler")  # what --fresh_states lets change
STATES = "settings_of_states"  # in a checkpoint's client_state
FILE = "run.json"
VERSIONS = "versions.json"
PACKAGES = ("alto-ds", "deepspeed", "torch", "transformers")


def identity_of(settings: Settings, engine: Any, fingerprint: str) -> dict[str, Any]:
    """All that decides the weights of a run.

    Args:
        settings: of the run.
        engine: DeepSpeed's engine, for what it has derived from the JSON.
        fingerprint: of text and tokenizer.
    """
    model, data, config = settings.model, settings.data, settings.deepspeed_config
    trained = data.tokenizer is None  # a resumed run goes on with that tokenizer and trains none
    return {
        "model": model.identity,
        "seq_length": model.length,
        "seed": settings.run.seed,
        "train_batch_size": engine.train_batch_size(),
        "dropout": model.dropout,
        "validation_sequences": data.validation_sequences,
        "vocab_size": data.vocab_size if trained else None,
        "tokenizer_documents": data.tokenizer_documents if trained else None,
        **{key: config[key] for key in DECISIVE if key in config},
        "gradient_clipping": engine.gradient_clipping(),
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "zero_optimization.stage": engine.zero_optimization_stage(),
        "data": fingerprint,
        "ranks": dist.get_world_size(),
    }


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write a run's identity into its folder."""
    write_json(folder / FILE, identity)


def write_versions(folder: Path) -> None:
    """Write what trains from this start on; a run may go on with other versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # a copy that was not installed
            found[name] = version(name)
    write_json(folder / VERSIONS, found)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole, in the place of an old one."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def make_checkpoints_folder(path: Path) -> None:
    """Make the folder of a run's checkpoints, before anything says that there is a run.

    Raises:
        FileNotFoundError: there is a run, and its checkpoints are gone.
    """
    if not path.is_dir() and (path.parent / FILE).exists():
        raise FileNotFoundError(
            f"{path} is gone, and {path.parent / FILE} says that there is a run. Bring it "
            "back to resume that run, or remove that file, too, to start anew."
        )
    path.mkdir(exist_ok=True)


def check_identity(folder: Path, identity: dict[str, Any], fresh_states: bool = False) -> None:
    """Refuse to go on with a run that would not be the same one, before anything is loaded.

    Args:
        folder: of the run.
        identity: of the run as it would go on.
        fresh_states: whether optimizer and schedule may be others.

    Raises:
        ValueError: naming each setting that differs from those the run was started with; or
            the file with those settings is missing or broken.
    """
    then = _flat(_read_identity(folder / FILE))
    changed = [
        change
        for key, change in _changes(then, _flat(identity))
        if not (fresh_states and key.split(".")[0] in OF_STATES)
    ]
    if changed:
        raise ValueError(
            f"the run in {folder} was started with {'; '.join(changed)}. Use the same settings to "
            "resume it, or another --output_dir to start anew."
        )


def settings_of_states(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of an identity that decides what optimizer and schedule have become, flat."""
    flat = _flat(identity)
    return {k: v for k, v in flat.items() if k.split(".")[0] in OF_STATES and k not in FREE}


def check_states(tag: str, client_state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse states of another optimizer or schedule.

    The run's own file may tell of newer ones, where a run with new states was killed before its
    first checkpoint, or that checkpoint is broken.

    Args:
        tag: name of the checkpoint.
        client_state: of the checkpoint; those of earlier versions do not tell, and are taken.
        settings: from :func:`settings_of_states`.

    Raises:
        ValueError: naming each setting that differs.
    """
    changed = [change for _, change in _changes(client_state.get(STATES, settings), settings)]
    if changed:
        raise ValueError(
            f"the optimizer's states in {tag} are of {'; '.join(changed)}. Use the same settings, "
            "or --fresh_states."
        )


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    """Each setting that has changed and may not, and how."""
    return [
        (key, f"{key}={then.get(key)}, now {now.get(key)}")
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key) and key not in (*CONVERTED, *FREE)
    ]


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        identity = json.loads(path.read_bytes())
        if not isinstance(identity, dict):
            raise ValueError(f"it holds {json.dumps(identity)[:60]}, no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}, which says with which settings the run was started, cannot be read: {error}. "
            "Copy it back from elsewhere, or start anew with another --output_dir."
        ) from None
    return identity


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by names such as ``optimizer.params.lr``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
