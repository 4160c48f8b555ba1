"""What is compared, and how? The settings of a comparison, and the checks of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alto_ds.compare.reading import build, join, read_mapping
from alto_ds.pretrain.settings import DataSettings, ModelSettings

METHODS = ("grid", "random", "optuna")
NAME = re.compile(r"[\w.+() -]+")
IDLE_STEPS = 2  # DeepSpeed's WarmupCosineLR starts one step late, and its logarithm is 0 then
DIGITS, MLP = "digits", "mlp"
# Kind of block, channels and blocks of each stage.
RESNETS: Mapping[str, tuple[str, Sequence[int], Sequence[int]]] = {
    "resnet20": ("basic", (16, 32, 64), (3, 3, 3)),
    "resnet32": ("basic", (16, 32, 64), (5, 5, 5)),
    "resnet56": ("basic", (16, 32, 64), (9, 9, 9)),
    "resnet18": ("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": ("basic", (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
}


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Pre-training of GPT-2 on text.

    Paths are relative to the folder in which the command is started. The text is either in files of
    its own for each part, or in ``files``, of which the last documents are held out.

    Attributes:
        type: "text".
        model: a name of :data:`alto_ds.pretrain.settings.SIZES`, or a config.json; the next six as
            in :class:`alto_ds.pretrain.settings.ModelSettings`.
        n_layer: blocks.
        n_embd: hidden size.
        n_head: attention heads.
        seq_length: tokens in a sequence.
        dropout: probability.
        compile: compile the model and its loss.
        train: files to train on.
        validation: files by which settings are chosen.
        test: files by which the results are reported.
        files: in place of these three.
        validation_fraction: of the documents of ``files``; a document has up to 20,000 characters.
        test_fraction: likewise, after those for validation.
        encoding: of the files.
        tokenizer: hub name or folder; None to train a byte-level BPE on the training text.
        vocab_size: tokens of the tokenizer that is trained.
        evaluation_sequences: of validation and of test text each, at most, evenly spread.

    Raises:
        ValueError: a value is out of its range, or two do not go together.
    """

    type: str = "text"
    model: str = "gpt2-tiny"
    n_layer: int | None = None
    n_embd: int | None = None
    n_head: int | None = None
    seq_length: int | None = None
    dropout: float = 0.0
    compile: bool = False
    train: Sequence[str] = ()
    validation: Sequence[str] = ()
    test: Sequence[str] = ()
    files: Sequence[str] = ()
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    encoding: str = "utf-8"
    tokenizer: str | None = None
    vocab_size: int = 4096
    evaluation_sequences: int = 2000

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "files"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a list of files")
        parts = (self.train, self.validation, self.test)
        if bool(self.files) == any(parts) or (not self.files and not all(parts)):
            raise ValueError("files must name text, or else train, validation and test, all three")
        at_least(1, evaluation_sequences=self.evaluation_sequences)
        for name in ("validation_fraction", "test_fraction"):
            number(0, 1, **{name: getattr(self, name)})
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        try:
            _ = self.model_settings, self.data(self.files or self.train)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--")) from None

    @property
    def tokens_per_sequence(self) -> int:
        """See :class:`alto_ds.compare.task.Task`."""
        return self.model_settings.length

    @property
    def model_settings(self) -> ModelSettings:
        """Those of the main job."""
        names = ("model", "n_layer", "n_embd", "n_head", "seq_length", "dropout", "compile")
        return ModelSettings(**{name: getattr(self, name) for name in names})

    def data(self, files: Sequence[str]) -> DataSettings:
        """Those of the main job, for some text files."""
        return DataSettings(
            text=[Path(file) for file in files],
            encoding=self.encoding,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """Classification of images.

    Attributes:
        type: "vision".
        dataset: "digits", 1,797 images of 8 x 8 that scikit-learn has, or the folder with the files
            of MNIST (or of a data set in its format), CIFAR-10 or CIFAR-100, in which they are
            published.
        model: "mlp", or a name of :data:`RESNETS`.
        hidden: units of each hidden layer of the mlp; None for 128.
        augment: crop training images at random after padding by 4, and flip half of them.
        label_noise: fraction of the training labels that another class replaces, drawn by the
            run's seed.
        validation_fraction: of the training images, with the same share of each class.
        test_fraction: of the images of digits, likewise; None for 0.2. Other data sets have test
            images.

    Raises:
        ValueError: a value is out of its range, or two do not go together.
    """

    type: str
    dataset: str
    model: str = "mlp"
    hidden: Sequence[int] | None = None
    augment: bool = False
    label_noise: float = 0.0
    validation_fraction: float = 0.1
    test_fraction: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str):
            raise ValueError(f"dataset={self.dataset!r} must be {DIGITS}, or a folder")
        if self.model not in (MLP, *RESNETS):
            raise ValueError(f"model={self.model!r} must be one of {', '.join((MLP, *RESNETS))}")
        if self.hidden is not None:
            if self.model != MLP:
                raise ValueError(f"hidden={self.hidden!r} is of {MLP} only; remove it")
            if not isinstance(self.hidden, list | tuple) or not self.hidden:
                raise ValueError(f"hidden={self.hidden!r} must be a list, such as [128]")
            for units in self.hidden:
                at_least(1, hidden=units)
        if type(self.augment) is not bool:
            raise ValueError(f"augment={self.augment!r} must be true or false")
        if not (_is_number(self.label_noise) and 0 <= self.label_noise < 1):
            raise ValueError(f"label_noise={self.label_noise!r} must be in [0, 1)")
        number(0, 1, validation_fraction=self.validation_fraction)
        if self.test_fraction is not None:
            if self.dataset != DIGITS:
                raise ValueError(
                    f"test_fraction={self.test_fraction!r} is of {DIGITS} only, for other data "
                    "sets have test images; remove it"
                )
            number(0, 1, test_fraction=self.test_fraction)

    @property
    def tokens_per_sequence(self) -> int:
        """See :class:`alto_ds.compare.task.Task`."""
        return 1


TaskSettings = TextSettings | VisionSettings
TASKS = {"text": TextSettings, "vision": VisionSettings}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Of the learning rate: DeepSpeed's WarmupCosineLR, from 0 and with its logarithmic warm-up.

    It is 0 in the first two steps.

    Attributes:
        warmup: fraction of the steps.
        floor: the last learning rate, as a fraction of the highest.

    Raises:
        ValueError: a value is out of its range.
    """

    warmup: float = 0.1
    floor: float = 0.1

    def __post_init__(self) -> None:
        number(0, 1, warmup=self.warmup)
        if not (_is_number(self.floor) and 0 <= self.floor <= 1):
            raise ValueError(f"floor={self.floor!r} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How settings are searched for, alike for each optimizer.

    Attributes:
        method: "grid" takes all combinations, "random" draws them, "optuna" is its TPE sampler.
        trials: for each optimizer.
        seed: of weights and order of the data in all trials, and of what is drawn.
        batch: trials that optuna proposes at once, before it knows how they end.

    Raises:
        ValueError: a value is out of its range.
    """

    method: str
    trials: int
    seed: int = 0
    batch: int = 4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {', '.join(METHODS)}")
        at_least(1, trials=self.trials, batch=self.batch)
        at_least(0, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values from low to high, both included.

    Attributes:
        low: the smallest.
        high: the largest.
        log: equal factors are equally likely, not equal differences.
        points: of a grid; None for the other methods.

    Raises:
        ValueError: it is empty.
    """

    low: float
    high: float
    log: bool = False
    points: int | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number")
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} must be above 0 with log: true")
        if self.points is not None:
            at_least(2, points=self.points)

    def place(self, value: float) -> float:
        """Where a value lies between low, 0, and high, 1."""
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of the optimizers that are compared.

    Attributes:
        type: a name of :data:`alto_ds.compare.optimizers.TYPES`.
        params: settings that stay as they are.
        search: for each setting that is searched for, its range, or a list of its values.

    Raises:
        ValueError: nothing says the learning rate, or a setting stands in both.
    """

    type: str
    params: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Range | Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("params", "search"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping of settings")
        for name in self.params.keys() & self.search.keys():
            raise ValueError(f"search.{name} is in params, too; remove one")
        if "lr" not in {**self.params, **self.search}:
            raise ValueError("search.lr is missing; give a range, a list, or a number in params")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A comparison.

    Attributes:
        task: what is trained.
        optimizers: by the names that the results have.
        search: how settings are searched for.
        seeds: of the final runs: weights and order of the data, the same for each optimizer.
        batch_size: sequences, or images, of a step.
        micro_batch_size: of a micro step, likewise; None for all of the step.
        steps: of each run; None where ``tokens`` says it.
        tokens: of each run, rounded down to whole steps.
        schedule: of the learning rate.
        gradient_clipping: largest global norm of the gradient; 0 for none.
        sharpness: training examples on which final runs measure it at their end; 0 for none.
        workers: runs side by side, each on one core, or taking turns on the GPUs.

    Raises:
        ValueError: a value is out of its range, or two do not go together.
    """

    task: TaskSettings
    optimizers: Mapping[str, Entry]
    search: SearchSettings
    seeds: Sequence[int]
    batch_size: int
    micro_batch_size: int | None = None
    steps: int | None = None
    tokens: int | None = None
    schedule: Schedule = field(default_factory=Schedule)
    gradient_clipping: float = 1.0
    sharpness: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size, workers=self.workers)
        at_least(0, sharpness=self.sharpness)
        for name in ("micro_batch_size", "steps", "tokens"):
            if (value := getattr(self, name)) is not None:
                at_least(1, **{name: value})
        if self.batch_size % self.micro:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={self.micro}"
            )
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("steps or tokens must say how long each run is, one of them")
        if self.total_steps <= IDLE_STEPS:
            length = "steps" if self.tokens is None else "tokens"
            raise ValueError(
                f"{length}={getattr(self, length)} makes {self.total_steps} step(s), and the "
                f"schedule's learning rate is 0 in the first {IDLE_STEPS}; give more"
            )
        if not (_is_number(self.gradient_clipping) and self.gradient_clipping >= 0):
            raise ValueError(f"gradient_clipping={self.gradient_clipping!r} must be at least 0")
        if not isinstance(self.seeds, list | tuple) or not self.seeds:
            raise ValueError(f"seeds={self.seeds!r} must be a list of whole numbers")
        for seed in self.seeds:
            at_least(0, seeds=seed)
        if len({*self.seeds}) < len(self.seeds) or self.search.seed in self.seeds:
            raise ValueError(
                f"seeds={[*self.seeds]} must differ, also from search.seed={self.search.seed}: the "
                "results must not come from what the settings were chosen by"
            )
        if not self.optimizers:
            raise ValueError("optimizers has none; name at least one")

    @property
    def micro(self) -> int:
        """Sequences of a micro step."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def total_steps(self) -> int:
        """Steps of each run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return self.tokens // self._step_tokens

    @property
    def _step_tokens(self) -> int:
        return self.batch_size * self.task.tokens_per_sequence


def read_spec(path: Path) -> Spec:
    """Read the settings of a comparison.

    Raises:
        ValueError: names the key by its path in the file, its value, and what to write instead.
        OSError: the file cannot be read.
    """
    given = read_mapping(path)
    sections = {"task": _task(given.get("task")), "search": SearchSettings, "schedule": Schedule}
    for name, kind in sections.items():
        if name in given:
            given[name] = build(kind, given[name], name)
    entries = given.get("optimizers", {})
    if not isinstance(entries, Mapping):
        raise ValueError("optimizers must be a mapping from names to settings")
    given["optimizers"] = {str(name): _entry(str(name), entry) for name, entry in entries.items()}
    return build(Spec, given, "")


def _task(given: Any) -> type[TaskSettings]:
    """The settings that a task of the type has; text where none is said."""
    kind = given.get("type", "text") if isinstance(given, Mapping) else "text"
    if kind not in (*TASKS,):  # it may be a list, which no mapping takes
        raise ValueError(f"task.type={kind!r} must be one of {', '.join(TASKS)}")
    return TASKS[kind]


def _entry(name: str, given: Any) -> Entry:
    where = f"optimizers.{name}"
    if not NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has letters, digits, spaces and . + - _ ( ) only")
    entry = build(Entry, given, where)
    search = {
        key: _candidates(values, join(where, f"search.{key}"))
        for key, values in entry.search.items()
    }
    return Entry(type=entry.type, params=entry.params, search=search)


def _candidates(given: Any, where: str) -> Range | Sequence[Any]:
    if isinstance(given, Mapping):
        return build(Range, given, where)
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(
            f"{where}={given!r} must be a list of at least 2 values, or low and high; what is not "
            "searched for belongs in params"
        )
    if any(given.count(value) > 1 for value in given):
        raise ValueError(f"{where}={given!r} has a value twice; remove one")
    return given


def at_least(minimum: int, **values: Any) -> None:
    """Refuse what is no whole number of at least the minimum."""
    for name, value in values.items():
        if type(value) is not int or value < minimum:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}")


def number(low: float, high: float, **values: Any) -> None:
    """Refuse what is no number between the two, neither included."""
    for name, value in values.items():
        if not (_is_number(value) and low < value < high):
            raise ValueError(f"{name}={value!r} must be in ({low}, {high})")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
