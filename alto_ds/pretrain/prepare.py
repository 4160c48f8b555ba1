"""Tokenize a large text once, for all runs on it.

.. code-block:: bash

    python -m alto_ds.pretrain.prepare --dataset NAME --tokenizer gpt2 --shards 64 \\
        --output_prefix data/edu

Under ``mpirun`` the ranks share the shards. The same command again keeps finished shards.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from alto_ds.pretrain import environment
from alto_ds.pretrain.data.prepare import PrepareError, prepare
from alto_ds.pretrain.exits import ExitStatus
from alto_ds.pretrain.options import OneLineParser, add_source
from alto_ds.pretrain.settings import DataSettings

NAME = "alto_ds.pretrain.prepare"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank.

    Returns:
        The exit status.
    """
    given = vars(_parser().parse_args(argv))
    prefix, shards, processes = (
        given.pop(name) for name in ("output_prefix", "shards", "processes")
    )
    try:
        for name, value in (("shards", shards), ("processes", processes)):
            if value < 1:
                raise ValueError(f"--{name}={value} must be at least 1")
        if shards > 99999:
            raise ValueError(f"--shards={shards} must be at most 99999, five digits of a name")
        if Path(prefix).is_dir() or prefix.endswith("/"):
            raise ValueError(f"--output_prefix={prefix} is a folder; add a name, as in data/edu")
        settings = DataSettings(**given)
        ranks = _ranks()
    except ValueError as error:
        return _refuse(str(error))
    start = time.monotonic()
    try:
        found = prepare(settings, prefix, shards, processes, ranks)
    except PrepareError as error:
        return _refuse(str(error)) if ranks is None or ranks.rank == 0 else ExitStatus.REFUSED
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted; the same command goes on", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    if ranks is None or ranks.rank == 0:
        numbers = [
            f"{sum(getattr(shard, name) for shard in found):,} {name}"
            for name in ("documents", "characters", "tokens")
        ]
        print(
            f"{prefix}: {', '.join(numbers)} in {shards} shard(s), after "
            f"{time.monotonic() - start:.1f} s. Train on it by --data {prefix}"
        )
    return ExitStatus.FINISHED


def _refuse(message: str) -> int:
    if environment.is_first_of_node(os.environ):
        print(f"{NAME}: error: {message}.", file=sys.stderr)
    return ExitStatus.REFUSED


def _ranks() -> Any:
    """The communicator of mpi4py where mpirun has started this process, else None."""
    started = os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE"))
    if started is None or started == "1":
        return None
    try:
        from mpi4py import MPI
    except ImportError:
        raise ValueError("mpirun has started this, and mpi4py is missing; install it") from None
    found = MPI.COMM_WORLD
    if found.size != int(started):
        # Otherwise each process would write all shards, beside the others.
        raise ValueError(
            f"mpirun has started {started} processes, and mpi4py finds {found.size}: they are of "
            "different MPIs; use the mpirun of the MPI that mpi4py loads"
        )
    return found


def _parser() -> OneLineParser:
    defaults = {field.name: field.default for field in fields(DataSettings)}
    parser = OneLineParser(
        prog=NAME,
        description="Tokenize text into Megatron's .bin/.idx, for --data of alto_ds.pretrain. The "
        "same command again keeps finished shards.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_prefix",
        required=True,
        metavar="PREFIX",
        help="of the files PREFIX-00000-of-00008.bin and so on, PREFIX.json and PREFIX-tokenizer",
    )
    parser.add_argument("--shards", type=int, default=8, help="files of tokens (default: 8)")
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="of this host, under mpirun of each rank (default: one for each core)",
    )
    text = parser.add_argument_group("text (default: Python's own standard library)")
    add_source(text)
    tokenizer = parser.add_argument_group("tokenizer (default: train a byte-level BPE)")
    tokenizer.add_argument("--tokenizer", help="hub name or folder")
    tokenizer.add_argument(
        "--vocab_size", type=int, help=f"of that to train (default: {defaults['vocab_size']})"
    )
    tokenizer.add_argument("--tokenizer_documents", type=int, help="documents to train it on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
