"""The task of classifying images, of scikit-learn's digits, MNIST, CIFAR-10 or CIFAR-100."""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import hashlib
import io
import itertools
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from alto_ds.compare.spec import DIGITS, MLP, RESNETS, VisionSettings
from alto_ds.compare.task import PARTS, Parameters
from alto_ds.pretrain.data.order import shuffled
from alto_ds.pretrain.data.sequences import digest

SPLIT_SEED = 0  # of validation and test images: the same for all runs
PADDING = 4  # pixels on each side, before an image is cropped


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
        pixels: uint8 [images, channels, height, width].
        labels: int64 [images], from 0.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def split(self, fraction: float, setting: str) -> tuple[Images, Images]:
        """Two parts that have the same share of each class; the second has the fraction."""
        try:
            numbers = train_test_split(
                np.arange(len(self.labels)),
                test_size=fraction,
                stratify=self.labels,
                random_state=SPLIT_SEED,
            )
        except ValueError as error:
            raise ValueError(
                f"task.{setting}={fraction} of {len(self.labels)} images: {error}"
            ) from None
        first, second = (Images(self.pixels[part], self.labels[part]) for part in numbers)
        return first, second


class Batch(NamedTuple):
    """What a micro batch has of the training images.

    Attributes:
        rows: numbers of the images, int64 [micro batch].
        labels: int64 [micro batch], with label noise.
        corners: upper and left edge of the crop in the padded image, int64 [2, micro batch].
        flips: which images are flipped, bool [micro batch].
    """

    rows: Tensor
    labels: Tensor
    corners: Tensor
    flips: Tensor


class ResNet(nn.Module):
    """He et al.'s residual network as for CIFAR: its stem is a 3 x 3 convolution without pooling.

    Args:
        name: of :data:`RESNETS`.
        channels: of the images.
        classes: outputs.
    """

    def __init__(self, name: str, channels: int, classes: int) -> None:
        super().__init__()
        block, widths, depths = RESNETS[name]
        config = ResNetConfig(
            num_channels=channels,
            embedding_size=min(widths[0], 64),
            hidden_sizes=[*widths],
            depths=[*depths],
            layer_type=block,
            num_labels=classes,
        )
        self.network = ResNetForImageClassification(config)
        stem = self.network.resnet.embedder
        first = nn.Conv2d(channels, config.embedding_size, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # as the others
        stem.embedder.convolution, stem.pooler = first, nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[images, classes]`` of ``[images, channels, height, width]``."""
        return self.network(pixels).logits


class VisionTask:
    """See :class:`alto_ds.compare.task.Task`. A "sequence" is an image.

    Args:
        settings: of the task.

    Raises:
        ValueError: the data set cannot be used.
        OSError: a file cannot be read.
    """

    headline = "error"
    tokens_per_sequence = 1

    def __init__(self, settings: VisionSettings) -> None:
        self._settings = settings
        self._parts = read(settings)
        train = self._parts["train"]
        self.classes = int(train.labels.max()) + 1
        self._pixels = torch.from_numpy(train.pixels)
        channels = [train.pixels[:, channel] for channel in range(train.pixels.shape[1])]
        self._mean = torch.tensor([[[channel.mean()]] for channel in channels]).float()
        # A channel that never changes has deviation 0.
        self._deviation = torch.tensor([[[channel.std() or 1.0]] for channel in channels]).float()

    def model(self, seed: int) -> nn.Module:
        """See :meth:`Task.model`. It gives logits of normalized images."""
        torch.manual_seed(seed)
        channels, height, width = self._pixels.shape[1:]
        if self._settings.model != MLP:
            return ResNet(self._settings.model, channels, self.classes)
        units = [channels * height * width, *(self._settings.hidden or [128])]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(units):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(units[-1], self.classes))

    def parameters(self, model: nn.Module) -> Parameters:
        """See :meth:`Task.parameters`. Convolutions count as matrices."""
        weights = [param for param in model.parameters() if param.ndim > 1]
        return Parameters(
            hidden=weights[1:-1],
            outer=[weights[0], weights[-1]],
            undecayed=[param for param in model.parameters() if param.ndim <= 1],
        )

    def labels(self, seed: int) -> Tensor:
        """Labels of the training images with label noise, int64 [images]."""
        labels = self._parts["train"].labels.copy()
        # NumPy's generator: that of PyTorch with the same seed gives the order of the images.
        random = np.random.default_rng(seed)
        count = round(self._settings.label_noise * len(labels))
        wrong = random.permutation(len(labels))[:count]
        labels[wrong] = (labels[wrong] + random.integers(1, self.classes, count)) % self.classes
        return torch.from_numpy(labels)

    def batches(self, seed: int, batch_size: int, micro_batch_size: int) -> Iterator[Batch]:
        """See :meth:`Task.batches`.

        Raises:
            ValueError: the batch is larger than the training set.
        """
        total = len(self._pixels)
        if batch_size > total:
            raise ValueError(
                f"batch_size={batch_size} must be at most {total}, the number of training images"
            )
        return self._batches(seed, batch_size, micro_batch_size)

    def _batches(self, seed: int, batch_size: int, micro_batch_size: int) -> Iterator[Batch]:
        labels = self.labels(seed)
        order = shuffled(len(labels), 0, seed)
        for step in itertools.count(1):
            rows = torch.tensor([*itertools.islice(order, batch_size)])
            random = np.random.default_rng([seed, step])
            corners = torch.from_numpy(random.integers(0, 2 * PADDING + 1, (2, batch_size)))
            flips = torch.from_numpy(random.random(batch_size) < 0.5)
            for part in torch.arange(batch_size).split(micro_batch_size):
                yield Batch(rows[part], labels[rows[part]], corners[:, part], flips[part])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :meth:`Task.loss`; cross-entropy in nats."""
        device = _device(model)
        self._pixels = self._pixels.to(device)  # once: it stays there
        rows, labels, corners, flips = (part.to(device) for part in batch)
        pixels = self._pixels[rows]
        if self._settings.augment:
            pixels = cropped(pixels, corners, flips)
        return F.cross_entropy(model(self._normalized(pixels)).float(), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str, micro_batch_size: int) -> dict[str, float]:
        """See :meth:`Task.evaluate`; mean cross-entropy in nats, and percent of wrong classes."""
        pixels, labels = map(torch.from_numpy, self._parts[part])
        device = _device(model)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        model.eval()
        batches = zip(pixels.split(micro_batch_size), labels.split(micro_batch_size), strict=True)
        for some, classes in batches:
            logits = model(self._normalized(some.to(device))).double()
            classes = classes.to(device)
            loss += F.cross_entropy(logits, classes, reduction="sum")
            wrong += (logits.argmax(1) != classes).sum()
        model.train()
        total = len(labels)
        return {"loss": loss.item() / total, "error": 100 * wrong.item() / total}

    def _normalized(self, pixels: Tensor) -> Tensor:
        """Mean 0 and deviation 1 over the training images, for each channel; float32."""
        mean, deviation = self._mean.to(pixels.device), self._deviation.to(pixels.device)
        return (pixels.float() - mean) / deviation


def cropped(pixels: Tensor, corners: Tensor, flips: Tensor) -> Tensor:
    """Crop images out of padded ones, and flip some of them.

    Args:
        pixels: ``[images, channels, height, width]``.
        corners: upper and left edges in the padded images, 0 to twice the padding,
            ``[2, images]``.
        flips: which to flip, ``[images]``.
    """
    images, channels, height, width = pixels.shape
    ys, xs, numbers, colors = (
        torch.arange(size, device=pixels.device) for size in (height, width, images, channels)
    )
    xs = torch.where(flips[:, None], width - 1 - xs, xs) + corners[1][:, None]
    ys = ys + corners[0][:, None]
    padded = F.pad(pixels, [PADDING] * 4)
    return padded[
        numbers[:, None, None, None], colors[:, None, None], ys[:, None, :, None], xs[:, None, None]
    ]


def fingerprint(settings: VisionSettings) -> str:
    """Tells runs on other images or with another model apart, wherever the files are.

    Raises:
        ValueError: the data set cannot be used.
        OSError: a file cannot be read.
    """
    of_parts = {
        name: [hashlib.sha256(array.tobytes()).hexdigest() for array in part]
        for name, part in read(settings).items()
    }
    return digest(of_parts, dataclasses.asdict(settings) | {"dataset": None})


def read(settings: VisionSettings) -> dict[str, Images]:
    """Images to train on, for validation and for the test, by these names.

    Raises:
        ValueError: the data set cannot be used.
        OSError: a file cannot be read.
    """
    if settings.dataset == DIGITS:
        found = load_digits()
        pixels = found.images.astype(np.uint8)[:, None]
        every = Images(pixels, found.target.astype(np.int64))
        rest, test = every.split(settings.test_fraction or 0.2, "test_fraction")
    else:
        rest, test = _read_folder(Path(settings.dataset))
    train, validation = rest.split(settings.validation_fraction, "validation_fraction")
    return dict(zip(("train", *PARTS), (train, validation, test), strict=True))


def _read_folder(folder: Path) -> tuple[Images, Images]:
    """Training and test images of a data set that is known by its files."""
    names = {path.name.removesuffix(".gz") for path in folder.glob("*")}
    if "train-images-idx3-ubyte" in names:
        train, test = (
            Images(
                _read_idx(folder / f"{part}-images-idx3-ubyte")[:, None],
                _read_idx(folder / f"{part}-labels-idx1-ubyte").astype(np.int64),
            )
            for part in ("train", "t10k")
        )
    elif "data_batch_1" in names:
        blocks = [_read_cifar(folder / f"data_batch_{n}", b"labels") for n in range(1, 6)]
        train = Images(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))
        test = _read_cifar(folder / "test_batch", b"labels")
    elif {"train", "test"} <= names:
        train, test = (_read_cifar(folder / part, b"fine_labels") for part in ("train", "test"))
    else:
        raise ValueError(
            f"task.dataset={str(folder)!r} must be {DIGITS}, or a folder with MNIST's "
            "train-images-idx3-ubyte.gz, CIFAR-10's data_batch_1 or CIFAR-100's train and so on"
        )
    for part, images in (("train", train), ("test", test)):
        if len(images.pixels) != len(images.labels):
            raise ValueError(
                f"task.dataset={str(folder)!r} has {len(images.pixels)} {part} images, but "
                f"{len(images.labels)} labels; get it again"
            )
    return train, test


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the format of MNIST, whether compressed or not."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
        # Two zeros, 8 for bytes, the number of dimensions, their sizes as big-endian integers.
        dimensions = data[3]
        shape = np.frombuffer(data, ">i4", dimensions, offset=4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as such")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole idx file of bytes ({error}); get it again") from None


# What pickles of arrays name. NumPy 2 has another name for one of them.
ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _OnlyArrays(pickle.Unpickler):
    """Reads arrays and Python's own types. A pickle can name any function, and have it called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return ARRAYS[module, name]


def _read_cifar(path: Path, labels: bytes) -> Images:
    """One of the files of CIFAR, which are pickles of Python 2."""
    try:
        found = _OnlyArrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(found[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        return Images(pixels, np.asarray(found[labels], np.int64))
    # A pickle that is none can raise any of these.
    except (
        pickle.UnpicklingError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
    ) as error:
        raise ValueError(f"{path} is no whole file of CIFAR ({error}); get it again") from None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
