"""The command ``python -m alto_ds.checkpoint``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "alto_ds.checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 2 after an error, which is one line."""
    parser = argparse.ArgumentParser(prog=NAME, description="Work on checkpoints of DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    universal = commands.add_parser("universal", help="convert for any number of ranks")
    universal.add_argument("IN", type=Path, help="a checkpoint, or the folder that holds them")
    universal.add_argument("OUT", type=Path, help="folder to make")
    given = parser.parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported
    from alto_ds.checkpoint import CheckpointError, convert

    try:
        checkpoint = convert(given.IN, given.OUT)
    except CheckpointError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    print(f"{NAME}: {checkpoint} is converted to {given.OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
