"""Launches of real ranks, one for each number of them, as plain processes that are forked."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.pretrain.forked import Forks
from tests.resizing.cases import PAIRS, Pair

SCRIPT = "tests/resizing/ranks.py"
Results = dict[str, list[dict[str, Any]]]  # by the name of the pair, what each rank saw


class Launches:
    """Writes all checkpoints of some pairs, then loads them.

    Args:
        folder: for checkpoints and results.
        forks: starts the ranks.
        names: of the pairs.
    """

    def __init__(self, folder: Path, forks: Forks, names: Iterable[str]) -> None:
        self.folder, self._forks = folder, forks
        self._pairs = {name: PAIRS[name] for name in names}

    def save(self) -> None:
        """Write the checkpoints, and what the ranks that wrote them became, in ``truth.pt``."""
        sources = {pair.source_name: name for name, pair in self._pairs.items()}
        for name, ranks in self._run("save", sources.values(), "source").items():
            assert not any(ranks), (name, ranks)

    @functools.cached_property
    def loaded(self) -> Results:
        """What each rank saw that loaded by alto_ds."""
        self.save()
        return self._run("load", self._pairs, "target")

    @functools.cached_property
    def loaded_by_deepspeed(self) -> Results:
        """What each rank saw that loaded by DeepSpeed alone, each pair in a launch of its own."""
        assert self.loaded
        found: Results = {}
        for name in self._pairs:
            found |= self._run("deepspeed", [name], "target", may_fail=True)
        return found

    def _run(self, work: str, names: Iterable[str], side: str, may_fail: bool = False) -> Results:
        found: Results = {}
        for count in range(1, 5):
            mine = [name for name in names if _ranks(self._pairs[name], side) == count]
            if not mine:
                continue
            ranks = self._forks.start(count, work, str(self.folder), *mine, script=SCRIPT)
            statuses = self._forks.wait(ranks, 300)
            printed = "\n".join(rank.log.read_text()[-3000:] for rank in ranks)
            assert may_fail or not any(statuses), printed
            files = [self.folder / f"{work}-{count}-{rank}.json" for rank in range(count)]
            results = [json.loads(file.read_text()) for file in files]
            found |= {name: [result[name] for result in results] for name in mine}
        return found


def _ranks(pair: Pair, side: str) -> int:
    return (pair.source if side == "source" else pair.target).ranks
