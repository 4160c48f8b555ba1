"""Which shards make up a prepared text, and are they as they were written?

``PREFIX.json``, the manifest, is written last: where it is, all shards are whole. Until then each
finished shard has a record of its own beside it, ``PREFIX-00000-of-00008.json``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from alto_ds.checkpoint.manifest import Entry, problem_of
from alto_ds.files import replace_text
from alto_ds.pretrain.data.indexed import bin_of, idx_of

PREPARE = "python -m alto_ds.pretrain.prepare"
# What of a tokenizer decides which tokens a text has; the rest is padding and templates.
DECISIVE = ("normalizer", "pre_tokenizer", "model", "added_tokens")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What was written of one part of the text.

    Attributes:
        job: hash of the text and of the settings it was prepared with.
        tokenizer: from :func:`tokenizer_hash`.
        documents: their number.
        tokens: their number, an end-of-text token after each document among them.
        characters: of the text.
        files: size and CRC-32 of the .bin and the .idx, by their names.
    """

    job: str
    tokenizer: str
    documents: int
    tokens: int
    characters: int
    files: dict[str, Entry]


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what decides which tokens a text has, the end-of-text token among it."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [*(whole[name] for name in DECISIVE), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_of(prefix: str) -> Path:
    """Folder of the tokenizer that a text was prepared with."""
    return Path(f"{prefix}-tokenizer")


def manifest_of(prefix: str) -> Path:
    """The file that names all shards."""
    return Path(f"{prefix}.json")


def shard_prefix(prefix: str, number: int, shards: int) -> str:
    """Where one of so many shards is, such as ``PREFIX-00000-of-00008``."""
    return f"{prefix}-{number:05d}-of-{shards:05d}"


def files_of(prefix: str) -> tuple[Path, Path]:
    """The .bin and the .idx of a shard."""
    return bin_of(prefix), idx_of(prefix)


def write_record(path: Path, shards: list[Shard]) -> None:
    """Write a manifest, or the record of one shard, at once, and wait until it is on the disk."""
    totals = {
        name: sum(getattr(shard, name) for shard in shards)
        for name in ("documents", "tokens", "characters")
    }
    table = {"tokenizer": shards[0].tokenizer, **totals, "shards": [asdict(s) for s in shards]}
    replace_text(path, json.dumps(table, indent=2) + "\n")


def read_record(path: Path) -> list[Shard]:
    """The shards of a manifest or a record.

    Raises:
        ValueError: it is missing or not as it was written.
    """
    try:
        found = json.loads(path.read_bytes())
        shards = [
            Shard(**row | {"files": {name: Entry(*e) for name, e in row["files"].items()}})
            for row in found["shards"]
        ]
        if not shards or any(type(shard.tokens) is not int for shard in shards):
            raise ValueError("no shards with numbers of tokens")
        if any(shard.tokenizer != found["tokenizer"] for shard in shards):
            raise ValueError("its shards are of other tokenizers")
        if any(Path(name).name != name for shard in shards for name in shard.files):
            raise ValueError("names files elsewhere")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; make it by {PREPARE}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not as it was written ({' '.join(str(error).split())}); remove it and run "
            f"{PREPARE} again"
        ) from None
    return shards


def problem_of_shard(folder: Path, shard: Shard, contents: bool) -> str | None:
    """Why a shard's files are not as they were written; None where they are.

    Args:
        folder: of the files.
        shard: what they must be.
        contents: whether to read them whole for their checksums; sizes are always compared.
    """
    for name, entry in shard.files.items():
        if (problem := problem_of(folder / name, entry, contents)) is not None:
            return f"{folder}/{problem}"
    return None
