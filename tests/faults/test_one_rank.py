"""What one rank alone shows: which checkpoints are counted, converted, loaded or refused."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("deepspeed")

import deepspeed

from alto_ds.checkpoint import (
    CheckpointError,
    convert,
    exist,
    load_universal,
    resume,
    save,
    saving,
)
from alto_ds.checkpoint.deepspeed_files import optimizers_of
from alto_ds.checkpoint.manifest import FILE
from alto_ds.pretrain.identity import check_states
from tests.faults.cases import flip
from tests.faults.harness import equal, make_engine, one_rank, save_steps, train_step

Groups = Callable[[nn.Module], list[dict[str, Any]]]


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("step"))


def test_after_a_fallback_broken_checkpoints_do_not_push_out_good_ones(tmp_path: Path) -> None:
    save_steps(make_engine(2), tmp_path, range(10, 40, 10), keep=3)
    for tag in ("step20", "step30"):
        flip(next((tmp_path / tag).glob("*optim*")), Random(0))
    engine = make_engine(2)
    resumed = resume(engine, tmp_path)
    assert resumed is not None
    assert resumed.tag == "step10"
    save_steps(engine, tmp_path, range(15, 16), keep=2)
    assert steps_in(tmp_path) == ["step10", "step15", "step20", "step30"]
    save_steps(engine, tmp_path, range(16, 17), keep=1)
    assert steps_in(tmp_path) == ["step16", "step20", "step30"]


def test_a_converted_folder_beside_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    engine = make_engine(2)
    save_steps(engine, tmp_path, range(1, 2))
    convert(tmp_path, tmp_path / "universal7")
    resumed = resume(make_engine(2), tmp_path)
    assert resumed is not None
    assert resumed.tag == "step1"
    save_steps(engine, tmp_path, range(8, 10), keep=1)
    assert (tmp_path / "universal7").is_dir()


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tensorboard2").mkdir()
    (tmp_path / "tensorboard2" / "events").write_text("")
    assert not exist(tmp_path)
    assert resume(make_engine(2), tmp_path) is None


def test_a_save_leaves_a_conversion_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alto_ds.checkpoint import converting

    engine = make_engine(2)
    save_steps(engine, tmp_path, range(1, 2))
    seal = converting.seal

    def save_then_seal(*arguments: Any) -> None:
        save_steps(engine, tmp_path, range(2, 3))
        seal(*arguments)

    monkeypatch.setattr(converting, "seal", save_then_seal)
    convert(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / FILE).exists()
    assert steps_in(tmp_path) == ["step1", "step2"]


@pytest.mark.parametrize("stage", [0, 2])
def test_states_are_new_once_for_the_same_settings(stage: int, tmp_path: Path) -> None:
    engine = make_engine(stage)
    save_steps(engine, tmp_path, range(1, 4))
    weights = [param.detach().clone() for param in engine.module.parameters()]

    def resumed_for(settings: dict[str, Any]) -> Any:
        engine = make_engine(stage)
        assert resume(engine, tmp_path, settings) is not None
        return engine

    def steps_of_states(engine: Any) -> set[int]:
        train_step(engine, 9)
        return {int(state["step"]) for state in engine.basic_optimizer.state.values()}

    new = resumed_for({"lr": 1})
    assert equal([param.detach() for param in new.module.parameters()], weights)
    assert (new.get_lr(), new.global_steps) == (engine.get_lr(), 3)
    assert steps_of_states(new) == {1}
    save(new, tmp_path, "step4", {"fresh_states": {"lr": 1}})
    assert steps_of_states(resumed_for({"lr": 1})) == {2}
    assert steps_of_states(resumed_for({"lr": 2})) == {1}


def test_states_of_other_settings_are_refused_whatever_the_runs_file_says() -> None:
    then = {"settings_of_states": {"optimizer.type": "Adam"}}
    check_states("step1", then, {"optimizer.type": "Adam"})
    check_states("step1", {}, {"optimizer.type": "ALTO"})  # of an earlier version
    with pytest.raises(ValueError, match=r"in step1 are of optimizer\.type=Adam, now ALTO"):
        check_states("step1", then, {"optimizer.type": "ALTO"})


def test_states_of_a_checkpoint_of_no_known_shape_are_not_fresh(tmp_path: Path) -> None:
    engine = make_engine(2)
    save_steps(engine, tmp_path, range(1, 2))
    model = next((tmp_path / "step1").glob("*model_states.pt"))
    content = torch.load(model, weights_only=False)
    del content["dp_world_size"]
    torch.save(content, model)
    (tmp_path / "step1" / FILE).unlink()
    with pytest.raises(CheckpointError, match="does not tell how it was written"):
        resume(make_engine(2), tmp_path, {"lr": 1})


class Parts(nn.Module):
    """Two layers, of which one may be in no group."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 7), nn.Linear(7, 3)

    def forward(self, samples: Tensor) -> Tensor:
        return self.second(self.first(samples))


def by_kind(model: nn.Module) -> list[dict[str, Any]]:
    weights, biases = (
        [param for param in model.parameters() if param.dim() == dims] for dims in (2, 1)
    )
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


def reversed_groups(model: nn.Module) -> list[dict[str, Any]]:
    return by_kind(model)[::-1]


def first_only(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.first.parameters())}]  # type: ignore[union-attr]


def engine_of_parts(stage: int, groups: Groups, **zero: Any) -> Any:
    model = Parts()
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "ALTO", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage, **zero},
    }
    return deepspeed.initialize(model=model, model_parameters=groups(model), config=config)[0]


@pytest.mark.parametrize(("stage", "target"), [(1, 3), (3, 2)])
def test_groups_in_another_order_are_refused(stage: int, target: int, tmp_path: Path) -> None:
    small = {"sub_group_size": 50} if stage == 3 else {}
    engine = engine_of_parts(stage, by_kind, **small)
    train_step(engine, 1)
    save(engine, tmp_path, "step1")
    convert(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="or the groups in another order"):
        load_universal(engine_of_parts(target, reversed_groups), tmp_path / "out")
    load_universal(engine_of_parts(target, by_kind), tmp_path / "out")
    with pytest.raises(CheckpointError, match="taken or loaded 1 steps; load into a new one"):
        load_universal(engine, tmp_path / "out")


def test_a_trained_layer_in_no_group_is_not_converted_from_zero3(tmp_path: Path) -> None:
    engine = engine_of_parts(3, first_only)
    train_step(engine, 1)
    save(engine, tmp_path, "step1")
    with pytest.raises(CheckpointError, match=r"only a part of second\.bias"):
        convert(tmp_path, tmp_path / "out")


def plant_a_name(folder: Path, kind: str, outside: Path) -> None:
    """Let a layer's name be a path, as a stranger may."""
    (folder / FILE).unlink()
    path = next(folder.glob(f"*{kind}_states.pt"))
    content = torch.load(path, weights_only=False)
    if kind == "model":
        content["param_shapes"][0][str(outside)] = torch.Size([2])
        content["module"][str(outside)] = torch.zeros(2)
    else:
        mapping = content["optimizer_state_dict"]["param_slice_mappings"][0]
        mapping[str(outside)] = next(iter(mapping.values()))
    torch.save(content, path)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_name_that_is_a_path_writes_nothing_elsewhere(kind: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    save_steps(make_engine(2), folder, range(1, 2))
    plant_a_name(folder / "step1", kind, outside)
    with pytest.raises(CheckpointError, match="which cannot be a file's name"):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_pickle_that_breaks_the_unpickler_is_refused(tmp_path: Path) -> None:
    engine = make_engine(2)
    save_steps(engine, tmp_path, range(1, 2))
    (tmp_path / "step1" / FILE).unlink()
    path = next((tmp_path / "step1").glob("*model_states.pt"))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, b"\x80\x02R." if name.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* cannot be read: pop from"):
        resume(make_engine(2), tmp_path)


def test_a_manifest_that_names_what_is_elsewhere_is_broken(tmp_path: Path) -> None:
    save_steps(make_engine(2), tmp_path, range(1, 3))
    manifest = tmp_path / "step2" / FILE
    files = json.loads(manifest.read_text())["files"] | {"../../../../../dev/zero": [0, 0]}
    crc32 = zlib.crc32(json.dumps(files, sort_keys=True).encode())
    manifest.write_text(json.dumps({"crc32": crc32, "files": files}))
    os.mkfifo(tmp_path / "step1" / "endless.pt")
    with pytest.raises(CheckpointError, match=r"endless\.pt is no regular file") as caught:
        resume(make_engine(2), tmp_path)
    assert f"{FILE} is not as it was written" in str(caught.value)


def test_where_states_of_a_rank_are_missing_the_one_before_is_converted(tmp_path: Path) -> None:
    engine = make_engine(1)
    save_steps(engine, tmp_path, range(1, 3))
    for tag in ("step1", "step2"):
        (tmp_path / tag / FILE).unlink()
    model = next((tmp_path / "step2").glob("*model_states.pt"))
    content = torch.load(model, weights_only=False)
    torch.save(content | {"dp_world_size": 2}, model)
    resumed = resume(make_engine(1), tmp_path)
    assert resumed is not None
    assert resumed.tag == "step1"
    assert "it has 1 files *_optim_states.pt in place of 2" in resumed.skipped["step2"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    save_steps(make_engine(2), tmp_path, range(1, 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/out cannot be made: Not a directory"):
        convert(tmp_path, tmp_path / "file" / "out")


@pytest.mark.parametrize("gone", [".", "step1"])
def test_what_vanishes_just_after_it_was_named_is_said(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = saving._publish

    def then_remove(folder: Path, *arguments: Any) -> None:
        publish(folder, *arguments)
        shutil.rmtree(folder / gone)

    monkeypatch.setattr(saving, "_publish", then_remove)
    with pytest.raises(CheckpointError, match=r"checkpoints is gone: |No such file.*step1"):
        save(make_engine(2), tmp_path / "checkpoints", "step1")


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_not_finite_is_said_before_anything_is_written(
    wrapped: bool, tmp_path: Path
) -> None:
    params = {"optimizer": "ALTO", "lr": 0.01} if wrapped else {"lr": 0.01}
    engine = make_engine(2, optimizer={"type": "E" if wrapped else "ALTO", "params": params})
    inner = list(optimizers_of(engine))[-1]

    def found() -> None:
        raise FloatingPointError("step 1: NaN")

    inner.raise_nonfinite = found
    with pytest.raises(FloatingPointError, match="rank 0: step 1: NaN"):
        save(engine, tmp_path, "step1")
    assert not list(tmp_path.iterdir())
