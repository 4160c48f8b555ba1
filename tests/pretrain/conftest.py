"""What the tests of the main job share."""

from pathlib import Path

import pytest

from tests import launcher


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def two_ranks(folder: Path) -> Path:
    """Results of a run on 2 ranks of one host under ZeRO-2."""
    from tests.pretrain.test_run import command

    launcher.run(2, *command(folder, "two-ranks"), folder=folder)
    return folder / "two-ranks"
