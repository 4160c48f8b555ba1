"""What commands share: how they end where an option is wrong, and options of model and text."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from alto_ds.pretrain.environment import is_first_of_node
from alto_ds.pretrain.exits import ExitStatus


class OneLineParser(argparse.ArgumentParser):
    """Ends with one line, which the first rank of each node prints."""

    def error(self, message: str) -> NoReturn:
        if is_first_of_node(os.environ):
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(ExitStatus.REFUSED)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add those of :class:`~alto_ds.pretrain.settings.ModelSettings` that change a model's size."""
    parser.add_argument("--n_layer", type=int, help="blocks (default: those of the model)")
    parser.add_argument("--n_embd", type=int, help="hidden size (default: that of the model)")
    parser.add_argument("--n_head", type=int, help="attention heads (default: those of the model)")


def add_source(group: argparse._ArgumentGroup) -> None:
    """Add those of :class:`~alto_ds.pretrain.settings.DataSettings` that name text as it is."""
    group.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="text files")
    group.add_argument("--encoding", help="of the text files (default: utf-8)")
    group.add_argument("--dataset", help="hub name, local folder or .jsonl file for `datasets`")
    group.add_argument("--dataset_config", help="configuration of the dataset on the hub")
    group.add_argument("--dataset_split", help="split of the dataset")
    group.add_argument("--text_column", help="column of the dataset with the text")
