"""What the tests of the main job share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import launcher
from tests.pretrain.forked import Forks
from tests.pretrain.runs import MODULE, options


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Redirects what the datasets library of this process keeps to a new folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def straight(folder: Path) -> str:
    """What a run on 2 ranks under ZeRO-2 printed that nobody interrupted, by the launcher.

    Its results are in ``folder / "straight"``.
    """
    return launcher.run(2, "--module", MODULE, *options(folder, "straight"), folder=folder)


@pytest.fixture(scope="session")
def forks(folder: Path) -> Iterator[Forks]:
    forks = Forks(folder)
    yield forks
    forks.close()
