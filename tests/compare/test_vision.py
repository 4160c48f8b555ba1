"""Images as a task of a comparison: what is read, in which order, with which labels."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from alto_ds.compare.spec import VisionSettings, read_spec
from alto_ds.compare.study import compare
from alto_ds.compare.vision import PADDING, Images, VisionTask, cropped, fingerprint, read
from tests.launcher import ROOT
from tests.pretrain.forked import Forks

RATES = [0.01, 0.03, 0.1]
ALTO = {"type": "ALTO", "params": {"weight_decay": 1e-4}, "search": {"lr": RATES}}
SPEC: dict[str, Any] = {
    "task": {"type": "vision", "dataset": "digits", "hidden": [32], "label_noise": 0.2},
    "steps": 6,
    "batch_size": 128,
    "micro_batch_size": 64,
    "search": {"method": "grid", "trials": 3},
    "seeds": [1],
    "optimizers": {"ALTO": ALTO, "the same": ALTO},
}
COLORS = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
GRAYS = COLORS[:, 0, :28, :28]
TEN = np.arange(60) % 10


def task(**settings: Any) -> VisionTask:
    return VisionTask(VisionSettings(type="vision", **{"dataset": "digits"} | settings))


def spec_file(folder: Path, **changes: Any) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes))
    return path


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def write_idx(path: Path, array: NDArray[Any], compressed: bool) -> None:
    """In MNIST's format: two zeros, 8 for bytes, the sizes as big-endian integers, the bytes."""
    head = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    if compressed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def write_mnist(folder: Path, compressed: bool = True) -> None:
    for part, some in (("train", slice(40)), ("t10k", slice(40, 60))):
        write_idx(folder / f"{part}-images-idx3-ubyte", GRAYS[some], compressed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", TEN[some], compressed)


PICKLER: Any = pickle._Pickler  # in Python, so that one can say how bytes are written


class PythonTwo(PICKLER):
    """Writes bytes as the text of Python 2, in which CIFAR's files have been written."""

    dispatch = dict(PICKLER.dispatch)  # noqa: RUF012

    def save_bytes(self, text: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[bytes] = save_bytes


def write_cifar(path: Path, some: slice, labels: str) -> None:
    array = COLORS[some].reshape(-1, 3072)
    found = {b"data": array, labels.encode(): TEN[some].tolist(), b"batch_label": b"some of them"}
    with path.open("wb") as file:
        PythonTwo(file, protocol=2).dump(found)
    # The name that the array's function had in the NumPy of these files.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multi", b"numpy.core.multi"))


def write_cifar10(folder: Path) -> None:
    for number in range(5):
        some = slice(8 * number, 8 * number + 8)
        write_cifar(folder / f"data_batch_{number + 1}", some, "labels")
    write_cifar(folder / "test_batch", slice(40, 60), "labels")


def write_cifar100(folder: Path) -> None:
    write_cifar(folder / "train", slice(40), "fine_labels")
    write_cifar(folder / "test", slice(40, 60), "fine_labels")


def write_plain_mnist(folder: Path) -> None:
    write_mnist(folder, compressed=False)


def test_digits_are_compared_and_two_equal_entries_end_alike(tmp_path: Path) -> None:
    printed = compare(read_spec(spec_file(tmp_path)), tmp_path)
    assert printed.startswith("| optimizer | test error (95 %) |")
    runs = rows(tmp_path / "runs.csv")
    one, other = (
        [
            {k: v for k, v in run.items() if k not in ("optimizer", "seconds", "run")}
            for run in runs
            if run["optimizer"] == name
        ]
        for name in ("ALTO", "the same")
    )
    assert one == other
    assert len(one) == 3 + 1
    [error] = [float(run["test_error"]) for run in one if run["stage"] == "final"]
    assert 0 < error < 80  # guessing has 90
    assert float(rows(tmp_path / "table.csv")[0]["test_error"]) == error
    curve = rows(tmp_path / f"curves/{runs[0]['run']}.csv")
    assert [int(row["tokens"]) for row in curve] == [128 * step for step in range(1, 7)]
    assert json.loads((tmp_path / "spec.json").read_text())["task"]["label_noise"] == 0.2


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.9])
def test_label_noise_replaces_exactly_its_fraction_by_other_classes(noise: float) -> None:
    noisy, clean = task(label_noise=noise), task()
    right = clean.labels(0)
    wrong = [noisy.labels(seed) != right for seed in (1, 2)]
    assert [int(found.sum()) for found in wrong] == [round(noise * len(right))] * 2
    assert torch.equal(noisy.labels(1), noisy.labels(1))
    assert torch.equal(wrong[0], wrong[1]) is (noise == 0)
    shift = (noisy.labels(1) - right)[wrong[0]] % 10
    counts = torch.bincount(shift, minlength=10)[1:]
    assert (counts - counts.sum() / 9).abs().max() <= 5 * (counts.sum() / 9).sqrt()  # uniform
    model = clean.model(0)
    for part in ("validation", "test"):  # their labels are right
        assert noisy.evaluate(model, part, 64) == clean.evaluate(model, part, 64)
    first = next(noisy.batches(1, 64, 64))
    assert torch.equal(first.labels, noisy.labels(1)[first.rows])
    # The wrong labels are not those that the first batches have.
    assert abs(wrong[0][first.rows].float().mean() - noise) <= 0.25


def test_the_order_depends_on_the_seed_alone_and_has_each_image_once_in_an_epoch() -> None:
    made = task()
    total = len(made.labels(0))

    def order(seed: int, micro: int) -> list[torch.Tensor]:
        """Rows, corners and flips of two steps of half an epoch."""
        batches = made.batches(seed, total // 2, micro)
        found = [next(batches) for _ in range(total // 2 // micro * 2)]
        return [torch.cat([getattr(b, k) for b in found], -1) for k in ("rows", "corners", "flips")]

    half = total // 2
    whole, parts, other = order(1, half), order(1, half // 2), order(2, half)
    assert len({*whole[0].tolist()}) == 2 * half
    assert all(map(torch.equal, whole, parts))
    assert not any(map(torch.equal, whole, other))
    assert not torch.equal(*whole[1].split(half, dim=1))  # the steps' crops


def test_parts_are_disjoint_and_have_the_same_share_of_each_class() -> None:
    parts = read(VisionSettings(type="vision", dataset="digits", validation_fraction=0.25))
    assert [len(part.labels) for part in parts.values()] == [1077, 360, 360]
    every = np.concatenate([part.labels for part in parts.values()])
    for part in parts.values():
        share = np.bincount(part.labels) / len(part.labels)
        assert np.abs(share - np.bincount(every) / len(every)).max() < 0.005
    images = {image.tobytes() for part in parts.values() for image in part.pixels}
    assert len(images) == len(every)  # of digits none is there twice


def test_crops_and_flips_are_those_of_single_images() -> None:
    pixels = torch.from_numpy(COLORS[:8, :, :20].copy())
    corners = torch.tensor([[0, 8, 4, 4, 1, 2, 3, 5], [0, 8, 4, 4, 7, 6, 5, 0]])
    flips = torch.tensor([False, True] * 4)
    found = cropped(pixels, corners, flips)
    for image, y, x, flip, result in zip(pixels, *corners.tolist(), flips, found, strict=True):
        padded = torch.zeros(3, 20 + 2 * PADDING, 32 + 2 * PADDING, dtype=torch.uint8)
        padded[:, PADDING:-PADDING, PADDING:-PADDING] = image
        crop = padded[:, y : y + 20, x : x + 32]
        assert torch.equal(result, crop.flip(2) if flip else crop)
    assert torch.equal(found[2], pixels[2])


def test_training_images_are_augmented_and_others_are_not() -> None:
    plain, augmented = task(), task(augment=True)
    model, batch = plain.model(0), next(plain.batches(0, 64, 64))
    assert augmented.loss(model, batch).item() != plain.loss(model, batch).item()
    still = batch._replace(
        corners=torch.full_like(batch.corners, PADDING), flips=batch.flips & False
    )
    assert augmented.loss(model, still).item() == plain.loss(model, batch).item()
    assert augmented.evaluate(model, "test", 64) == plain.evaluate(model, "test", 64)


@torch.no_grad()
def test_error_is_percent_of_the_images_and_loss_their_mean_cross_entropy() -> None:
    made = task()
    train, _, test = read(VisionSettings(type="vision", dataset="digits")).values()
    pixels = (test.pixels - train.pixels.mean()) / train.pixels.std()
    model = made.model(0)
    probabilities = model(torch.from_numpy(pixels).float()).softmax(1).numpy()
    found = made.evaluate(model, "test", 64)
    right = probabilities[np.arange(len(test.labels)), test.labels]
    assert found["loss"] == pytest.approx(-np.log(right).mean(), rel=1e-5)
    assert found["error"] == 100 * (probabilities.argmax(1) != test.labels).mean()
    assert made.loss(model, next(made.batches(0, 1293, 1293))).item() == pytest.approx(2.3, abs=0.2)


@pytest.mark.parametrize("write", [write_mnist, write_plain_mnist, write_cifar10, write_cifar100])
def test_folders_are_read_as_they_are_published(write: Any, tmp_path: Path) -> None:
    write(tmp_path)
    settings = VisionSettings(type="vision", dataset=str(tmp_path), validation_fraction=0.25)
    parts = read(settings)
    expected = GRAYS[:, None] if "mnist" in write.__name__ else COLORS
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "train": 30,
        "validation": 10,
        "test": 20,
    }
    assert np.array_equal(parts["test"].pixels, expected[40:])
    assert np.array_equal(parts["test"].labels, TEN[40:])
    by_image = {image.tobytes(): label for image, label in zip(expected, TEN, strict=True)}
    for part in parts.values():
        assert [by_image[image.tobytes()] for image in part.pixels] == part.labels.tolist()
    made = VisionTask(settings)
    assert made.classes == 10
    made.loss(made.model(0), next(made.batches(0, 8, 8))).backward()


def test_the_fingerprint_is_of_images_and_settings_not_of_the_place(tmp_path: Path) -> None:
    prints = []
    for name, write in (("a", write_mnist), ("b", write_plain_mnist), ("c", write_cifar10)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        settings: dict[str, Any] = {
            "type": "vision",
            "dataset": str(tmp_path / name),
            "validation_fraction": 0.25,
        }
        prints.append(fingerprint(VisionSettings(**settings)))
        prints.append(fingerprint(VisionSettings(**settings | {"label_noise": 0.1})))
    assert prints[:2] == prints[2:4]
    assert len({*prints}) == 4


def test_a_resnet_learns_with_its_convolutions_as_matrices() -> None:
    made = task(model="resnet20", augment=True)
    model = made.model(1)
    assert all(map(torch.equal, model.parameters(), made.model(1).parameters()))
    hidden, outer, undecayed = made.parameters(model)
    assert len(hidden) == 20  # 18 in blocks, and two that change the size
    assert [tuple(param.shape) for param in outer] == [(16, 1, 3, 3), (10, 64)]
    assert len(hidden) + len(outer) + len(undecayed) == len([*model.parameters()])
    shapes = []
    stem = model.get_submodule("network.resnet.embedder")
    stem.register_forward_hook(lambda *found: shapes.append(found[2].shape[2:]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = next(made.batches(1, 64, 64))
    losses = []
    for _ in range(3):
        loss = made.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert {*shapes} == {(8, 8)}  # the stem keeps the images' size
    assert 0 <= made.evaluate(model, "test", 64)["error"] <= 100
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "audio"}, "task.type='audio' must be one of text, vision"),
        ({"dataset": None}, "task.dataset is missing"),
        ({"modell": "mlp"}, "task.modell is no setting; did you mean model?"),
        ({"model": "resnet21"}, "task.model='resnet21' must be one of mlp, resnet20, "),
        ({"model": "resnet20"}, "task.hidden=[32] is of mlp only; remove it"),
        ({"hidden": 32}, "task.hidden=32 must be a list, such as [128]"),
        ({"hidden": [0]}, "task.hidden=0 must be a whole number of at least 1"),
        ({"augment": 1}, "task.augment=1 must be true or false"),
        ({"label_noise": 1}, "task.label_noise=1 must be in [0, 1)"),
        ({"validation_fraction": 0}, "task.validation_fraction=0 must be in (0, 1)"),
        ({"dataset": "x", "test_fraction": 0.1}, "task.test_fraction=0.1 is of digits only"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {k: v for k, v in (SPEC["task"] | change).items() if v is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        read_spec(spec_file(tmp_path, task=given))


def test_the_readmes_task_has_settings(tmp_path: Path) -> None:
    readme = (ROOT / "alto_ds/compare/README.md").read_text()
    given = yaml.safe_load(readme.split("```yaml\n")[2].split("```")[0])
    settings = read_spec(spec_file(tmp_path, **given)).task
    assert isinstance(settings, VisionSettings)
    assert settings.hidden == [128, 128]


def test_a_batch_larger_than_the_data_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = read_spec(spec_file(tmp_path, batch_size=2048))
    with pytest.raises(ValueError, match=r"^batch_size=2048 must be at most 1293, the number of"):
        compare(spec, tmp_path)
    assert "runs to do" not in capsys.readouterr().out


def test_muon_on_convolutions_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    muon = {"type": "Muon", "search": {"lr": RATES}}
    changes = {"task": {"type": "vision", "dataset": "digits", "model": "resnet20"}}
    spec = read_spec(spec_file(tmp_path, **changes, optimizers={"M": muon}))
    with pytest.raises(ValueError, match=r"^optimizers\.M\.params=.* is refused by Muon: .*2D"):
        compare(spec, tmp_path)
    assert "runs to do" not in capsys.readouterr().out


class Called:
    """A pickle of it calls a function when it is read."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("called"),)


def test_files_that_are_not_whole_are_refused_and_no_pickle_calls_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = VisionSettings(type="vision", dataset=".")

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            read(settings)

    refused(r"task\.dataset='\.' must be digits, or a folder with MNIST's train-images")
    write_cifar100(tmp_path)
    Path("test").write_bytes(pickle.dumps({b"data": Called()}))
    refused(r"test is no whole file of CIFAR \(it names pathlib\.Path\.touch|test is no whole")
    assert not Path("called").exists()
    Path("test").write_bytes(Path("train").read_bytes()[:-100])
    refused("test is no whole file of CIFAR")
    write_mnist(tmp_path)
    write_idx(Path("t10k-labels-idx1-ubyte"), TEN[:19], compressed=True)
    refused(r"task\.dataset='\.' has 20 test images, but 19 labels")
    packed = Path("train-images-idx3-ubyte.gz")
    for data in (packed.read_bytes()[:-50], b"no gzip", gzip.compress(b"\0\0\x08\x03" + b"\0" * 9)):
        packed.write_bytes(data)
        refused("train-images-idx3-ubyte is no whole idx file")


def test_a_class_with_too_few_images_is_refused() -> None:
    images = Images(COLORS[:, :1], np.array([*TEN[:59], 10]))
    with pytest.raises(ValueError, match=r"^task\.validation_fraction=0\.5 of 60 images: "):
        images.split(0.5, "validation_fraction")


@pytest.mark.slow  # pytest -m slow tests/compare/test_vision.py: half a minute
def test_the_example_trains_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    printed = []
    forks = Forks(tmp_path)
    try:
        for ranks, stage in ((1, 0), (2, 3)):
            config = json.loads((ROOT / "configs/gpt2-tiny/zero2.json").read_text())
            path = tmp_path / f"zero{stage}.json"
            path.write_text(json.dumps(config | {"zero_optimization": {"stage": stage}}))
            words = ["--deepspeed_config", str(path), "--dataset", "digits", "--steps", "50"]
            started = forks.start(ranks, *words, script="examples/vision.py")
            ends = forks.wait(started, 250)
            output = started[0].log.read_text()
            assert ends == [0] * ranks, output
            losses = re.findall(r"step \d+: loss ([\d.]+)", output)
            [accuracy] = re.findall(r"test accuracy ([\d.]+) %", output)
            assert len(losses) == 2
            assert float(accuracy) > 80
            printed.append([*map(float, losses), float(accuracy) / 100])
    finally:
        forks.close()
    assert printed[1] == pytest.approx(printed[0], abs=2e-3)
