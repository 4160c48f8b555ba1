"""Preparing a large text against ``datasets.map`` with the same tokenizer and processes.

The text is Python's own standard library and its tests, document after document, until it has
500 MB, in a .jsonl file. Reading it into the library's cache is timed apart, for both need it.
Prepared is also once more, killed half way, and compared.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alto_ds.pretrain.data.sequences import _pack
from alto_ds.pretrain.data.shards import tokenizer_of
from alto_ds.pretrain.data.text import documents
from alto_ds.pretrain.data.tokenizer import load_tokenizer, make_tokenizer
from alto_ds.pretrain.settings import DataSettings
from tests.benchmarks.contenders import arguments, write

MEGABYTES = 500
PROCESSES = 2
TOKENIZER = {"vocab_size": 32000, "tokenizer_documents": 1000}
MAP = "map"


def write_text(path: Path) -> float:
    """Write the text; return its megabytes."""
    texts = [row["text"].encode() for row in documents(DataSettings())]
    size = number = 0
    with open(path, "w") as file:
        while size < MEGABYTES * 1e6:
            text = texts[number % len(texts)]
            # Not always the same documents, which a cache could answer for.
            file.write(json.dumps({"text": f"{number}\n{text.decode()}"}) + "\n")
            size, number = size + len(text), number + 1
    return size / 1e6


def by_map(text: Path, tokenizer: Path) -> None:
    """What the main job does with a text that is not prepared."""
    load = load_tokenizer(str(tokenizer))
    documents(DataSettings(dataset=str(text))).map(
        _pack,
        batched=True,
        fn_kwargs={"tokenizer": load, "length": 1024},
        remove_columns=["text"],
        num_proc=PROCESSES,
        new_fingerprint="benchmark",
    )


def command_of(text: Path, prefix: Path) -> list[str]:
    module = [sys.executable, "-m", "alto_ds.pretrain.prepare", "--dataset", str(text)]
    values = {"output_prefix": prefix, "shards": 8, "processes": PROCESSES} | TOKENIZER
    return [*module, *(word for k, v in values.items() for word in (f"--{k}", str(v)))]


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def killed_half_way(command: list[str], prefix: Path) -> int:
    """Kill the command when half the shards are there; return how many were."""
    process = subprocess.Popen(command)
    while len(found := list(prefix.parent.glob(f"{prefix.name}-0*.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(found)


def shards_of(prefix: Path) -> list[Path]:
    return sorted(prefix.parent.glob(f"{prefix.name}-*.[bi]*"))


def same_bytes(first: Path, second: Path) -> bool:
    pairs = zip(shards_of(first), shards_of(second), strict=True)
    return all(subprocess.run(["cmp", "-s", a, b]).returncode == 0 for a, b in pairs)


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HF_HOME"] = str(folder / "hf")
        text = folder / "text.jsonl"
        megabytes = write_text(text)
        start = time.perf_counter()
        source = documents(DataSettings(dataset=str(text)))
        reading = time.perf_counter() - start
        first, second = folder / "first" / "text", folder / "second" / "text"
        # Trained before, so that no time has that of it.
        data = DataSettings(dataset=str(text), **TOKENIZER)  # type: ignore[arg-type]
        for prefix in (first, second):
            place_of = tokenizer_of(str(prefix))
            make_tokenizer(data, source, source._fingerprint, place_of, resumed=False)
        prepared = timed(command_of(text, first))
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        kept = killed_half_way(command_of(text, second), second)
        resumed = timed(command_of(text, second))
        same = same_bytes(first, second)
        tokenizer = tokenizer_of(str(first))
        module = [sys.executable, "-m", "tests.benchmarks.prepare", MAP, str(text), str(tokenizer)]
        mapped = timed(module)
    rows: list[dict[str, Any]] = [
        {"what": "reading, for both", "seconds": reading, "MB/s": megabytes / reading},
        {
            **{"what": "prepare", "seconds": prepared, "MB/s": megabytes / prepared},
            "GiB of the largest process": memory,
        },
        {"what": "datasets.map", "seconds": mapped, "MB/s": megabytes / mapped},
        {"what": f"killed with {kept} of 8 shards, same bytes: {same}", "seconds": resumed},
    ]
    write(options.report, rows)


if __name__ == "__main__":
    if sys.argv[1] == MAP:
        by_map(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
