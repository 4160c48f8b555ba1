"""Where does the text come from?

By default from the running Python's own standard library: tens of megabytes of code and
documentation that every machine has. ``--text`` reads files, ``--dataset`` anything that the
``datasets`` library loads.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from alto_ds.pretrain.settings import DataSettings

TEXT = "text"


def documents(settings: DataSettings) -> Any:
    """Return the documents that the settings name: a dataset with one column, ``text``.

    Returns:
        ``datasets.Dataset``, or ``datasets.IterableDataset`` where the settings say ``streaming``.

    Raises:
        ValueError: a file is missing, a dataset has no such column, or there is no text at all.
    """
    if settings.dataset:
        return _text_column(_load(settings, settings.dataset), settings)
    return _of_files(settings.text or _standard_library())


def _of_files(files: Sequence[Path]) -> Any:
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"--text names files that do not exist: {', '.join(missing)}.")
    # Sizes and times make the library read the files again where one has changed.
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if not any(size for _, size, _ in stamps):
        raise ValueError("--text names only empty files; give at least one with text.")
    return datasets.Dataset.from_generator(_read, gen_kwargs={"stamps": stamps})


def _read(stamps: list[list[Any]]) -> Iterator[dict[str, str]]:
    """One document per 20,000 characters of a file, so that one long file can be split."""
    for path, *_ in stamps:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), 20_000):
            yield {TEXT: text[start : start + 20_000]}


def _standard_library() -> list[Path]:
    """The standard library's Python sources in the order of their names, tests included."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if path.stat().st_size and "site-packages" not in path.parts
    )


def _load(settings: DataSettings, name: str) -> Any:
    streaming = settings.streaming
    if name.endswith((".jsonl", ".json")):
        if not Path(name).is_file():
            raise ValueError(f"--dataset names a file that does not exist: {name}.")
        return datasets.load_dataset("json", data_files=name, split="train", streaming=streaming)
    return datasets.load_dataset(
        name, settings.dataset_config, split=settings.dataset_split, streaming=streaming
    )


def _text_column(loaded: Any, settings: DataSettings) -> Any:
    name, column = settings.dataset, settings.text_column
    if loaded.column_names is not None and column not in loaded.column_names:
        raise ValueError(
            f"--text_column={column} is not in dataset {name}, which has the columns "
            f"{', '.join(loaded.column_names)}."
        )
    kind = loaded.features[column] if loaded.features else None
    if kind is not None and "string" not in getattr(kind, "dtype", ""):
        raise ValueError(
            f"--text_column={column} of dataset {name} holds {kind}; name a column of text."
        )
    loaded = loaded.select_columns([column])
    return loaded if column == TEXT else loaded.rename_column(column, TEXT)
