"""Where does the text come from?

By default from the running Python's own standard library: tens of megabytes of code and
documentation that every machine has. ``--text`` reads files, ``--dataset`` anything that the
``datasets`` library loads.
"""

from __future__ import annotations

import codecs
import io
import json
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from alto_ds.pretrain.settings import DataSettings

TEXT = "text"
FEATURES = datasets.Features({TEXT: datasets.Value("string")})
# Those of UTF-32 first, for one of them begins as one of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def documents(settings: DataSettings) -> Any:
    """Return the documents that the settings name: a dataset with one column, ``text``.

    Returns:
        ``datasets.Dataset``, or ``datasets.IterableDataset`` where the settings say ``streaming``.

    Raises:
        ValueError: a file is missing, or holds something else than text; a dataset cannot be
            loaded or has no such column; there is no text at all; or the cache cannot be written.
            It names the file, and where in it the first wrong byte or line is.
    """
    if not settings.streaming:
        _check_cache(Path(datasets.config.HF_DATASETS_CACHE))
    if settings.dataset is None:
        files = settings.text or _standard_library()
        return _of_files(files, settings.encoding if settings.text else None)
    if settings.dataset.endswith((".jsonl", ".json")) and not Path(settings.dataset).is_file():
        raise ValueError(f"--dataset names a file that does not exist: {settings.dataset}.")
    if settings.dataset.endswith(".jsonl"):
        return _of_json_lines(Path(settings.dataset), settings)
    return _text_column(_load(settings, settings.dataset), settings)


def _check_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"the folder {folder}, where the datasets library keeps what it has read, cannot be "
            f"written to ({error.strerror}); set HF_HOME or HF_DATASETS_CACHE to one that can."
        ) from None


def _of_files(files: Sequence[Path], encoding: str | None) -> Any:
    folders = [str(path) for path in files if path.is_dir()]
    if folders:
        raise ValueError(f"--text names folders: {', '.join(folders)}; name the files in them.")
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"--text names files that do not exist: {', '.join(missing)}.")
    stamps = [_stamp(path) for path in files]
    if not any(size for _, size, _ in stamps):
        raise ValueError("--text names only empty files; give at least one with text.")
    return _generated(_read, {"stamps": stamps, "encoding": encoding})


def _stamp(path: Path) -> tuple[str, int, int]:
    """Size and time make the library read a file again where it has changed."""
    return str(path), path.stat().st_size, path.stat().st_mtime_ns


def _generated(read: Any, arguments: dict[str, Any]) -> Any:
    try:
        return datasets.Dataset.from_generator(read, features=FEATURES, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def _read(stamps: list[tuple[str, int, int]], encoding: str | None) -> Iterator[dict[str, str]]:
    """One document per 20,000 characters of a file, so that one long file can be split."""
    for path, *_ in stamps:
        for text in _parts(Path(path), encoding):
            yield {TEXT: text}


def _parts(path: Path, encoding: str | None) -> Iterator[str]:
    """What :func:`read_text` reads, 20,000 characters at a time: a file may be large."""
    errors = "strict" if encoding else "replace"
    try:
        if encoding:
            _check_mark(path, encoding)
        with open(path, encoding=encoding or "utf-8", errors=errors) as file:
            while text := file.read(20_000):
                if encoding and "\0" in text:
                    raise ValueError(f"{path} is no text")
                yield text
    except ValueError:  # UnicodeDecodeError is one
        read_text(path, encoding)  # says where in the file it is wrong
        raise


def read_text(path: Path, encoding: str | None) -> str:
    """The text of a file, its lines ended by ``\\n``.

    Args:
        path: of the file.
        encoding: of its bytes; None for UTF-8 where bytes that are not are replaced, as in the
            standard library's own test files.

    Raises:
        ValueError: the file holds something else; names it and the offset of the first such byte.
    """
    raw = path.read_bytes()
    if encoding is None:
        return _with_plain_lines(raw.decode("utf-8", errors="replace"))
    _check_mark(path, encoding)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        other = "latin-1" if codecs.lookup(encoding).name == "utf-8" else "utf-8"
        raise ValueError(
            f"{path} is not {encoding}: byte {raw[error.start]:#04x} at offset {error.start}; name "
            f"its encoding, such as --encoding {other}, or convert it to UTF-8."
        ) from None
    if "\0" in text:
        offset = len(text[: text.index("\0")].encode(encoding))
        raise ValueError(
            f"{path} is no text: NUL at byte {offset}. Leave it out if it is binary; if it is "
            "UTF-16, write --encoding utf-16-le (or utf-16-be), or convert it to UTF-8."
        )
    return _with_plain_lines(text)


def _check_mark(path: Path, encoding: str) -> None:
    with open(path, "rb") as file:
        begin = file.read(4)
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if begin.startswith(mark)), None)
    if marked and not codecs.lookup(encoding).name.startswith(marked):
        raise ValueError(
            f"{path} is {marked.upper()}, by its mark at byte 0; write --encoding {marked}, or "
            "convert it to UTF-8."
        )


def _with_plain_lines(text: str) -> str:
    return io.StringIO(text, newline=None).read() if "\r" in text else text


def _of_json_lines(path: Path, settings: DataSettings) -> Any:
    arguments: dict[str, Any] = {"stamp": _stamp(path), "column": settings.text_column}
    if next(_read_json_lines(**arguments), None) is None:
        raise ValueError(f"--dataset={path} has no lines; name a file with documents.")
    if not settings.streaming:
        return _generated(_read_json_lines, arguments)
    for _ in _read_json_lines(**arguments):
        pass  # a wrong line is found now, not after days of training
    return datasets.IterableDataset.from_generator(
        _read_json_lines, features=FEATURES, gen_kwargs=arguments
    )


def _read_json_lines(stamp: tuple[str, int, int], column: str) -> Iterator[dict[str, str | None]]:
    """The documents of a .jsonl file; a document may be null.

    Raises:
        ValueError: names the first line that is no JSON object with text in ``column``.
    """
    path = stamp[0]
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield {TEXT: _text_of(line, column, f"{path}, line {number}")}


def _text_of(line: bytes, column: str, place: str) -> str | None:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8: byte {line[error.start]:#04x} at offset {error.start} of the "
            "line; convert the file to UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {error}; repair or remove the line.") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{place} is no JSON object; each line must be one, such as "
            f"{{{json.dumps(column)}: ...}}."
        )
    if column not in row:
        raise ValueError(
            f"--text_column={column} is not in {place}, which has the columns "
            f"{', '.join(row) or '(none)'}."
        )
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"--text_column={column} holds {json.dumps(text)[:60]} in {place}; name a column of "
            "text."
        )
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{place} holds half a surrogate pair, which is no character; repair the line."
        ) from None
    return text


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
    try:
        if name.endswith(".json"):
            return datasets.load_dataset(
                "json", data_files=name, split="train", streaming=streaming
            )
        return datasets.load_dataset(
            name, settings.dataset_config, split=settings.dataset_split, streaming=streaming
        )
    except Exception as error:  # the library has no base class of what it raises
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"--dataset={name} cannot be loaded: {reason}. Name a dataset of the hub, with its "
            "--dataset_config and --dataset_split, a folder, or a .jsonl file."
        ) from error


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
