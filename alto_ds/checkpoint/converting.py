"""How does a checkpoint become one that any number of ranks can load?

DeepSpeed's own converter joins what the ranks hold, and leaves a file for each parameter and
state. It knows two states by name, those of Adam, and loses every other without a word. So it runs
once more for each other state, on files in which that state has the name of Adam's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from tqdm import tqdm

from alto_ds.checkpoint.deepspeed_files import MODEL_FILES, OPTIMIZER_FILES, read
from alto_ds.checkpoint.folders import newest_first
from alto_ds.checkpoint.ranks import CheckpointError
from alto_ds.checkpoint.saving import naming, seal
from alto_ds.checkpoint.shape import Shape, problem_of_count, shape_of_files
from alto_ds.checkpoint.verifying import problem_of_checkpoint
from alto_ds.files import flush
from alto_ds.states import EXP_AVG, EXP_AVG_SQ

ADAM = (EXP_AVG, EXP_AVG_SQ)  # the states that DeepSpeed's converter knows
PARAMETERS = "zero"  # folder of a folder for each parameter, with a file for each state
COMMON = f"{PARAMETERS}/optimizer_state.pt"  # what is not of one parameter, such as the groups
SCALARS = "scalars.pt"  # by parameter and name, its states that are one number; not of DeepSpeed
WORKING = ".converting-"  # not as saving's, which removes what it finds
INFO = "universal_checkpoint_info"  # how tensor parallelism cuts the parameters


def convert(source: Path, out: Path) -> Path:
    """Convert a checkpoint for any number of ranks, whole or not at all; in one process.

    Args:
        source: a checkpoint, or the folder that holds them: then the newest whole one.
        out: the folder to make. It becomes as large as the checkpoint, and needs three times as
            much space while it is made.

    Returns:
        The checkpoint that was converted.

    Raises:
        CheckpointError: none is whole, it cannot be converted, or ``out`` cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there already; name a folder that is not")
    checkpoint = _newest_whole(source)
    _check(checkpoint)
    working = out.parent / f"{WORKING}{out.name}"
    try:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be made: {error.strerror}; name another folder"
        ) from error
    try:
        with naming(out.parent, f"DeepSpeed's converter of {checkpoint}"):
            converted = working / out.name
            _convert(checkpoint, converted)
            seal(converted, {})
            converted.rename(out)
            flush(out.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return checkpoint


def _newest_whole(source: Path) -> Path:
    if any(source.glob(MODEL_FILES)):
        candidates = [source]
    else:
        candidates = [source / name for name in newest_first(source)]
    if not candidates:
        raise CheckpointError(f"{source} is no checkpoint, and there is none in it")
    problems: list[str] = []
    for path in candidates:
        problem = problem_of_checkpoint(path)
        if problem is None:
            for line in problems:
                print(f"alto_ds.checkpoint: skipped {line}", file=sys.stderr)
            return path
        problems.append(f"{path.name}: {problem}")
    raise CheckpointError(f"no checkpoint in {source} can be converted ({'; '.join(problems)})")


def _check(checkpoint: Path) -> None:
    """Refuse what DeepSpeed's converter would get wrong, or fail at without a reason."""
    shape = shape_of_files(checkpoint)
    if any(checkpoint.glob("layer_*")):
        raise CheckpointError(
            f"{checkpoint} is of a PipelineModule, or of DeepSpeed's experts, which cannot be "
            "converted; go on with as many ranks as before"
        )
    if shape.stage == 0:
        raise CheckpointError(
            f"{checkpoint} was written at ZeRO stage 0, which does not say whose the states are; "
            "go on at stage 0, on any number of ranks, or write a checkpoint at stage 1 to 3"
        )
    problem = problem_of_count(checkpoint, shape)
    if problem is not None:
        raise CheckpointError(f"{checkpoint} cannot be converted: {problem}")
    _check_names(checkpoint, shape)
    first = read(_files(checkpoint, OPTIMIZER_FILES)[0])
    config = first["ds_config"] if isinstance(first.get("ds_config"), dict) else {}
    zero = config.get("zero_optimization", {})
    if shape.stage == 2 and shape.ranks > 1 and zero.get("round_robin_gradients"):
        raise CheckpointError(
            f"{checkpoint} was written with round_robin_gradients, and DeepSpeed's converter takes "
            "one parameter for another then; go on with as many ranks as before, or without it"
        )
    if not all(any(map(_is_flat, state.values())) for state in _states(first).values()):
        raise CheckpointError(f"{checkpoint} has no optimizer states; take a step, and save again")
    if shape.tensor_parallel > 1 and INFO not in read(_files(checkpoint, MODEL_FILES)[0]):
        raise CheckpointError(
            f"{checkpoint} was written with tensor parallelism and does not say how it cuts the "
            f'parameters; save with client_state={{"{INFO}": ...}}, as Megatron-DeepSpeed does'
        )


def _check_names(checkpoint: Path, shape: Shape) -> None:
    """Read every file once as nothing is executed, and refuse names that would leave ``out``."""
    names: set[str] = set()
    for path in _files(checkpoint, MODEL_FILES):
        model = read(path)
        trained = {name for shapes in model["param_shapes"] for name in shapes}
        frozen = set(model.get("frozen_param_shapes") or ())
        names |= trained | frozen
        known = trained | frozen | {*model["buffer_names"], *(model.get("shared_params") or ())}
        lost = sorted(model["module"].keys() - known) if shape.stage == 3 else ()
        if lost:
            raise CheckpointError(
                f"{checkpoint} has only a part of {lost[0]}, which is trained in name but in no "
                "parameter group; set its requires_grad to False, or put it into a group"
            )
    for path in _files(checkpoint, OPTIMIZER_FILES):
        content = read(path)
        names |= {key for state in _states(content).values() for key in state}
        mappings = content["optimizer_state_dict"].get("param_slice_mappings") or ()
        names |= {name for mapping in mappings for name in mapping}
    for name in names:
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{checkpoint} names a layer or state {name!r}, which cannot be a file's name; "
                "do not load this checkpoint if it is not your own"
            )


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files of a kind by the rank that is the first number in their names."""
    return sorted(folder.glob(pattern), key=lambda path: [*map(int, re.findall(r"\d+", path.name))])


def _states(content: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The optimizer's states of a file, by the number of their flat tensor."""
    parts = content["optimizer_state_dict"]
    base = parts.get("optimizer_state_dict", parts.get("base_optimizer_state"))
    return base["state"]


def _is_flat(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _convert(checkpoint: Path, out: Path) -> None:
    models, optimizers = _files(checkpoint, MODEL_FILES), _files(checkpoint, OPTIMIZER_FILES)
    layers: list[list[str]] = [list(shapes) for shapes in read(models[0])["param_shapes"]]
    states = _states(read(optimizers[0]))
    owners: dict[str, list[str]] = {}  # by state, the layers that have it
    scalars: dict[str, dict[str, Any]] = {}
    for number, state in states.items():
        for key, value in state.items():
            if _is_flat(value):
                owners.setdefault(key, []).extend(layers[number])
        numbers = {key: value for key, value in state.items() if not _is_flat(value)}
        scalars |= dict.fromkeys(layers[number], numbers)

    is_adam = all(state.keys() >= set(ADAM) for state in states.values())
    others = [key for key in owners if not (is_adam and key in ADAM)]
    # Shown on a terminal. The runs of the converter take about the same time.
    with tqdm(
        total=1 + len(others), desc="Converting", unit="run", disable=None, dynamic_ncols=True
    ) as bar:
        with _prepared(checkpoint, None if is_adam else others[0], out.parent) as prepared:
            _run(prepared, out)
        bar.update()
        if not is_adam:
            for path in out.glob(f"{PARAMETERS}/**/{EXP_AVG}*.pt"):
                path.unlink()
        for key in others:
            _add_state(checkpoint, out, key, owners[key])
            bar.update()
    shape = shape_of_files(checkpoint)
    if shape.stage == 3 and shape.tensor_parallel == 1:
        _save_frozen(models, out)
    torch.save(scalars, out / SCALARS)


def _add_state(checkpoint: Path, out: Path, key: str, layers: list[str]) -> None:
    """Convert a state that DeepSpeed's converter does not know, unless it does by now."""
    files = {name: _file(out, name, key) for name in layers}
    if all(file.exists() for file in files.values()):
        return
    again = out.parent / "again"
    with _prepared(checkpoint, key, out.parent) as prepared:
        _run(prepared, again)
    for name, file in files.items():
        _file(again, name, EXP_AVG).rename(file)
    shutil.rmtree(again)


def _file(converted: Path, layer: str, state: str) -> Path:
    return converted / PARAMETERS / layer / f"{state}.pt"


@contextlib.contextmanager
def _prepared(checkpoint: Path, key: str | None, working: Path) -> Iterator[Path]:
    """A copy for DeepSpeed's converter in which the state ``key``, if any, is called as Adam's.

    The copy knows no padding at the end of a group. The converter would cut all of it from the
    last rank's tensor, which may be shorter; it needs none, for it is told where layers lie.
    """
    copy = working / "prepared"
    copy.mkdir()
    for path in _files(checkpoint, MODEL_FILES):
        (copy / path.name).symlink_to(path.resolve())
    for path in _files(checkpoint, OPTIMIZER_FILES):
        content = read(path)
        paddings = content["optimizer_state_dict"].get("group_paddings", [])
        if key is None and not any(paddings):
            (copy / path.name).symlink_to(path.resolve())
            continue
        paddings[:] = [0] * len(paddings)
        for state in _states(content).values():
            if key is not None:  # what becomes of groups that have no such state is not used
                value = state.get(key, next(filter(_is_flat, state.values())))
                state |= dict.fromkeys(ADAM, value)
        torch.save(content, copy / path.name)
    yield copy
    shutil.rmtree(copy)


def _run(checkpoint: Path, out: Path) -> None:
    """Let DeepSpeed convert; it leaves ``latest_universal`` beside ``out``."""
    tensor_parallel = shape_of_files(checkpoint).tensor_parallel > 1
    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=not tensor_parallel,  # how layers are cut, which none is then
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


def _save_frozen(models: list[Path], out: Path) -> None:
    """Write the parameters that are not trained, which ZeRO-3 cuts and the converter leaves out."""
    contents = [read(path) for path in models]
    for name, shape in (contents[0]["frozen_param_shapes"] or {}).items():
        parts = [content["frozen_param_fragments"][name].flatten() for content in contents]
        whole = torch.cat(parts)[: torch.Size(shape).numel()].view(shape)
        _file(out, name, "fp32").parent.mkdir(parents=True)
        torch.save({"param": whole.clone()}, _file(out, name, "fp32"))
