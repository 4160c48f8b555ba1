"""How does a large text become Megatron's ``.bin/.idx``, once for all runs on it?

The documents are dealt to shards in their order. Each process tokenizes one shard at a time and
never holds more than some megabytes of it; under mpirun each rank has processes of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from alto_ds.checkpoint.manifest import entry_of
from alto_ds.files import remove_unfinished, replacing
from alto_ds.pretrain.data.indexed import IndexedWriter, token_dtype
from alto_ds.pretrain.data.shards import (
    Shard,
    files_of,
    manifest_of,
    problem_of_shard,
    read_record,
    shard_prefix,
    tokenizer_hash,
    tokenizer_of,
    write_record,
)
from alto_ds.pretrain.data.text import TEXT, documents
from alto_ds.pretrain.data.tokenizer import load_tokenizer, make_tokenizer
from alto_ds.pretrain.settings import DataSettings

T = TypeVar("T")
ROWS = 64  # documents read at once
CHARACTERS = 1 << 20  # tokenized at once; each takes up to 100 bytes meanwhile


class PrepareError(RuntimeError):
    """What a user must change, raised on every rank alike."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process must know to write a shard.

    Attributes:
        source: dataset with a column ``text``.
        prefix: path that the names of all files begin with.
        shards: their number in all.
        key: hash of text and settings.
        tokenizer: hash of the tokenizer, which is in :func:`tokenizer_of` the prefix.
    """

    source: Any
    prefix: str
    shards: int
    key: str
    tokenizer: str


def prepare(
    settings: DataSettings, prefix: str, shards: int, processes: int, ranks: Any = None
) -> list[Shard]:
    """Write the text as shards and a manifest; shards that are there are kept.

    The bytes depend on text, tokenizer and the number of shards alone.

    Args:
        settings: which text and tokenizer.
        prefix: path that the names of all files begin with.
        shards: their number.
        processes: of this rank.
        ranks: communicator of mpi4py whose ranks call this together and see the same files;
            None for one process without MPI.

    Raises:
        PrepareError: on all ranks. What the prefix names is of another text or tokenizer; or text,
            tokenizer or disk is not in order. Finished shards stay.
    """
    rank, count = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    lock = _together(ranks, lambda: _lock(prefix) if rank == 0 else None)
    try:
        # The first rank fills the caches of text and tokenizer; the rest then find them.
        first = _together(
            ranks, lambda: _first_job(settings, prefix, shards) if rank == 0 else None
        )
        key = _from_first(ranks, first and first.key)
        job = _together(ranks, lambda: first or _same_job(settings, prefix, shards, key))
        mine = list(range(rank, shards, count))
        _together(ranks, lambda: _write(job, mine, processes, shown=rank == 0))
        return _from_first(ranks, _together(ranks, lambda: _finish(job) if rank == 0 else None))
    finally:
        if lock is not None:
            os.close(lock)


def _from_first(ranks: Any, value: Any) -> Any:
    return value if ranks is None else ranks.bcast(value)


def _together(ranks: Any, work: Callable[[], T]) -> T:
    """Do ``work`` and wait for all ranks; where one failed, raise its error on all."""
    result, error = None, None
    try:
        result = work()
    except Exception as found:  # also what nobody foresaw: the other ranks wait
        error = found
    told = None if error is None else " ".join(str(error).split()) or repr(error)
    first = next((e for e in ([told] if ranks is None else ranks.allgather(told)) if e), None)
    if first is not None:
        raise PrepareError(first) from error
    return result  # type: ignore[return-value]  # work has returned


def _lock(prefix: str) -> int:
    """Keep other preparations away from the prefix as long as this process has the file open."""
    folder = tokenizer_of(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"--output_prefix={prefix} is being prepared by another process; wait for it, or name "
            "another prefix"
        ) from None
    return descriptor


def _key(settings: DataSettings, source: Any, shards: int) -> str:
    trained = (settings.vocab_size, settings.tokenizer_documents)
    parts = (source._fingerprint, shards, settings.tokenizer or trained)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _first_job(settings: DataSettings, prefix: str, shards: int) -> Job:
    source = documents(settings)
    if len(source) < shards:
        raise ValueError(f"--shards={shards} is more than the text's {len(source)} document(s)")
    key = _key(settings, source, shards)
    prefixes = [prefix, *(shard_prefix(prefix, number, shards) for number in range(shards))]
    remove_unfinished([p for name in prefixes for p in (*files_of(name), manifest_of(name))])
    records = [r for path in map(manifest_of, prefixes) if path.exists() for r in read_record(path)]
    folder = tokenizer_of(prefix)
    changed = any(record.job != key for record in records)
    if not changed:
        tokenizer = make_tokenizer(settings, source, source._fingerprint, folder, resumed=False)
        now = tokenizer_hash(tokenizer)
        changed = any(record.tokenizer != now for record in records)
    if changed:
        raise ValueError(
            f"--output_prefix={prefix} has shards of another text, tokenizer or number of shards; "
            "use the same settings to go on, or name another prefix"
        )
    if settings.tokenizer:
        tokenizer.save_pretrained(folder)
    return _job(source, prefix, shards, key)


def _same_job(settings: DataSettings, prefix: str, shards: int, key: str) -> Job:
    source = documents(settings)
    if _key(settings, source, shards) != key:
        raise ValueError("the ranks read different text: have all hosts the same files?")
    return _job(source, prefix, shards, key)


def _job(source: Any, prefix: str, shards: int, key: str) -> Job:
    tokenizer = load_tokenizer(str(tokenizer_of(prefix)))
    return Job(
        source=source,
        prefix=prefix,
        shards=shards,
        key=key,
        tokenizer=tokenizer_hash(tokenizer),
    )


def _write(job: Job, numbers: list[int], processes: int, shown: bool) -> None:
    """Write those of the shards that are not there, by so many processes.

    The progress bar tells of this rank's documents; ``shown`` says whether there is one.
    """
    sizes = {number: len(_part(job, number)) for number in numbers}
    written, folder = _written(job), Path(job.prefix).parent
    left = [
        number
        for number in numbers
        if (shard := written[number]) is None or problem_of_shard(folder, shard, contents=True)
    ]
    done = sum(sizes[number] for number in numbers if number not in left)
    total = sum(sizes.values())
    with tqdm(
        **{"total": total, "initial": done, "desc": "Preparing", "unit": "doc"},
        disable=not shown,
        dynamic_ncols=True,
    ) as bar:
        if processes == 1:
            for number in left:
                write_shard(job, number, bar.update)
        else:
            _by_processes(job, [left[n::processes] for n in range(processes)], bar.update)


def _by_processes(job: Job, shares: list[list[int]], report: Callable[[int], Any]) -> None:
    """Write each share of the shards in a process of its own."""
    # A fork would inherit the locks of threads, of mpi4py's and of the tokenizer's.
    new = multiprocessing.get_context("spawn")
    started: dict[Connection, Any] = {}
    try:
        for share in filter(None, shares):
            here, there = new.Pipe(duplex=False)
            process = new.Process(target=_write_share, args=(job, share, there), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            started[here] = process
        left = set(started)
        while left:
            for pipe in wait(list(left)):
                assert isinstance(pipe, Connection)
                try:
                    told = pipe.recv()
                except EOFError:
                    left.remove(pipe)
                    started[pipe].join()
                    if code := started[pipe].exitcode:
                        raise ValueError(
                            f"a process that wrote shards has ended with exit status {code}; the "
                            "same command goes on. Was there too little memory? Use fewer "
                            "--processes"
                        ) from None
                    continue
                if isinstance(told, Exception):
                    raise told
                report(told)
    finally:
        for process in started.values():
            process.terminate()
            process.join()


def _write_share(job: Job, numbers: list[int], pipe: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    if not parent.is_alive():  # killed while this process was starting
        return
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    try:
        for number in numbers:
            write_shard(job, number, pipe.send)
    except Exception as error:
        pipe.send(ValueError(str(error) or repr(error)))


def _end_with(parent: Any) -> None:
    """Not to go on writing where the parent was killed, beside the next start of the command."""
    parent.join()
    os._exit(1)


def write_shard(job: Job, number: int, report: Callable[[int], Any]) -> None:
    """Write one shard, its files whole or not at all.

    Args:
        job: what is prepared.
        number: of the shard.
        report: called with numbers of documents that were read since the call before.
    """
    tokenizer = load_tokenizer(str(tokenizer_of(job.prefix)))
    prefix = shard_prefix(job.prefix, number, job.shards)
    files = files_of(prefix)
    count = tokens = characters = 0

    def texts() -> Iterator[str]:
        nonlocal characters
        part = _part(job, number)
        for start in range(0, len(part), ROWS):
            rows = part[start : start + ROWS][TEXT]
            for text in filter(None, rows):  # datasets have nulls, too
                characters += len(text)
                yield text
            report(len(rows))

    with replacing(files[0]) as new_bin, replacing(files[1]) as new_idx:
        with IndexedWriter(new_bin, new_idx, token_dtype(len(tokenizer))) as writer:
            for document in tokenized(texts(), tokenizer):
                writer.add(document)
                count, tokens = count + 1, tokens + len(document)
        shard = Shard(
            job=job.key,
            tokenizer=job.tokenizer,
            documents=count,
            tokens=tokens,
            characters=characters,
            files={files[0].name: entry_of(new_bin), files[1].name: entry_of(new_idx)},
        )
    write_record(manifest_of(prefix), [shard])


def _part(job: Job, number: int) -> Any:
    return job.source.shard(job.shards, number, contiguous=True)


def tokenized(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[array[int]]:
    """The tokens of each document, with an end-of-text token after them, int32.

    A document of more than a million characters is tokenized in pieces, cut before spaces, which
    gives tokenizers that split at spaces, such as GPT-2's, the same tokens.
    """
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    document = array("i")
    for batch in _batches(piece for text in texts for piece in _pieces(text)):
        encoded = encode([piece for piece, _ in batch], add_special_tokens=False)
        for (_, last), part in zip(batch, encoded, strict=True):
            document.extend(part.ids)
            if last:
                document.append(tokenizer.eos_token_id)
                yield document
                document = array("i")


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a document, and whether each is its last."""
    start = 0
    while len(text) - start > CHARACTERS:
        space = text.rfind(" ", start + 1, start + CHARACTERS)
        end = space if space > 0 else start + CHARACTERS
        yield text[start:end], False
        start = end
    yield text[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _written(job: Job) -> list[Shard | None]:
    """What the records of the shards say, or the manifest of all; None where neither is there."""
    records = [
        manifest_of(shard_prefix(job.prefix, number, job.shards)) for number in range(job.shards)
    ]
    manifest = manifest_of(job.prefix)
    then: list[Any] = read_record(manifest) if manifest.exists() else [None] * job.shards
    return [
        read_record(record)[0] if record.exists() else before
        for record, before in zip(records, then, strict=True)
    ]


def _finish(job: Job) -> list[Shard]:
    """Write the manifest, which makes the records of the shards needless."""
    shards = [shard for shard in _written(job) if shard is not None]
    assert len(shards) == job.shards
    write_record(manifest_of(job.prefix), shards)
    for number in range(job.shards):
        manifest_of(shard_prefix(job.prefix, number, job.shards)).unlink(missing_ok=True)
    return shards
