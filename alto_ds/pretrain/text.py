"""Where does the text come from?

By default from the running Python's own standard library: tens of megabytes of code and
documentation that every machine has. ``--text`` reads files, ``--dataset`` anything that the
``datasets`` library loads.
"""

from __future__ import annotations

import sysconfig
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

TEXT = "text"


def documents(arguments: Namespace) -> Any:
    """Return the documents that the command line names: a dataset with one column, ``text``.

    Returns:
        ``datasets.Dataset``, or ``datasets.IterableDataset`` with ``--streaming``.

    Raises:
        ValueError: a file is missing, a dataset has no such column, or there is no text at all.
    """
    if arguments.dataset:
        return _named_dataset(arguments)
    if arguments.streaming:
        raise ValueError("--streaming goes with --dataset; leave it out for files.")
    files = [Path(name) for name in arguments.text] if arguments.text else _standard_library()
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"--text names files that do not exist: {', '.join(missing)}.")
    # Sizes and times make the library read the files again where one has changed.
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if not any(size for _, size, _ in stamps):
        raise ValueError("--text names only empty files; give at least one with text.")
    return datasets.Dataset.from_generator(_read, gen_kwargs={"stamps": stamps})


def _read(stamps: list[list[Any]]) -> Iterator[dict[str, str]]:
    """One document per line group of a file: long files are cut so that they can be split."""
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


def _named_dataset(arguments: Namespace) -> Any:
    name, split = arguments.dataset, arguments.dataset_split
    if name.endswith((".jsonl", ".json")):
        if not Path(name).is_file():
            raise ValueError(f"--dataset names a file that does not exist: {name}.")
        loaded = datasets.load_dataset(
            "json", data_files=name, split="train", streaming=arguments.streaming
        )
    else:
        loaded = datasets.load_dataset(
            name, arguments.dataset_config, split=split, streaming=arguments.streaming
        )
    column = arguments.text_column
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
