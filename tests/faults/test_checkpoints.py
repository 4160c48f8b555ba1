"""Checkpoints are whole, or they are not used: nothing that happens to files starts a wrong run."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

from alto_ds.checkpoint.manifest import FILE
from tests.faults.harness import seen


@pytest.mark.parametrize("stage", range(4))
def test_whatever_happens_to_a_file_the_newest_whole_checkpoint_is_resumed(stage: int) -> None:
    """The table is printed: file, damage, what is resumed alone and beside a whole checkpoint."""
    ranks = seen(f"damage-zero{stage}")
    files = {row["file"] for row in ranks[0]}
    assert len(files) == (2, 4, 4, 5)[stage]
    assert len(ranks[0]) == 4 * len(files) + 1
    for row, other in zip(*ranks, strict=True):
        alone, beside = row["alone"], row["beside"]
        print(f"ZeRO-{stage} {row['file']} {row['damage']}: {alone['holds']}, {beside['holds']}")
        assert other["alone"]["holds"] == alone["holds"], row
        assert other["beside"]["holds"] == beside["holds"], row
        if row["damage"] == "none":
            assert (alone["holds"], beside["holds"]) == ("step2", "step2")
        elif row["file"] == FILE and row["damage"] == "removed":
            assert (alone["holds"], beside["holds"]) == ("step2", "step1")
            assert "step2 has no manifest.json, so it could not be verified" in alone["said"]
            assert "skipped step2: it has no manifest.json, and step1 has been" in beside["said"]
        else:
            assert (alone["holds"], beside["holds"]) == ("refused", "step1"), row
            assert f"skipped step2: {row['file']} " in beside["said"]
            assert f"(step2: {row['file']} " in alone["said"]
            assert "resuming from" in beside["said"]


def test_without_a_manifest_what_is_resumed_is_right_or_refused() -> None:
    """Checkpoints of the time before manifests: the archives' own checksums must do."""
    ranks = seen("damage-no-manifest")
    for row, other in zip(*ranks, strict=True):
        print(row["file"], row["damage"], row["alone"]["holds"], row["beside"]["holds"])
        assert other["alone"]["holds"] == row["alone"]["holds"]
        assert row["alone"]["holds"] in ("refused", "step2"), row
        assert row["beside"]["holds"] == "step1", row
        if row["damage"] in ("truncated", "emptied", "removed"):
            assert row["alone"]["holds"] == "refused", row


def test_what_latest_says_does_not_lose_a_checkpoint() -> None:
    said = {
        "removed": "latest is missing",
        "missing": "latest names step7",
        "older": "latest names step1",
        "empty": "latest is missing",
    }
    first, second = seen("latest")
    for name, line in said.items():
        tag, equal, error, printed = first[name]
        assert (tag, equal, error) == ("step2", True, ""), name
        assert line in printed
        assert second[name] == ["step2", True, "", ""]  # rank 0 speaks
    assert "no checkpoint in" in first["alone"][2]
    assert first["alone"][2] == second["alone"][2]
    assert first["no folder"] == [None, "", ""]


def test_the_newest_whole_ones_and_those_of_keep_every_stay() -> None:
    for names in seen("keep"):
        assert [name for name in names if name.startswith("step")] == [
            *("step10", "step4", "step6", "step8", "step9"),
        ]
        assert not [name for name in names if name.startswith(".")]


def test_a_whole_checkpoint_is_never_overwritten() -> None:
    for found in seen("same-name"):
        assert "step2 is there already and whole, and is not overwritten" in found["refused"]
        assert not found["changed"]
        assert (found["resumed"], found["then"]) == ("step1", "step2")
        assert {"step1", "step2", "step2.broken"} <= set(found["names"])


def test_a_planted_pickle_is_not_executed() -> None:
    for found in seen("planted"):
        assert not found["executed"]
        assert (found["tag"], found["equal"]) == ("step1", True)
    said = seen("planted")[0]["said"]
    assert "optim_states.pt would run posix.system when it is loaded" in said


def test_a_full_disk_leaves_the_checkpoint_before_and_is_named() -> None:
    for found in seen("full-disk"):
        for name in ("half", "nothing"):
            assert "no space left on device" in found[name]
            assert "full-disk: " in found[name]  # the folder
            assert {"latest", "step1"} <= set(found[f"{name} names"])
            assert "step2" not in found[f"{name} names"]
            assert ".writing-step2" not in found[f"{name} names"]
            assert found[f"{name} resumed"] == ["step1", True]
        assert (found["space"], found["latest"]) == ("", "step2")


def test_a_read_only_folder_is_named_and_still_resumed() -> None:
    for found in seen("read-only"):
        assert "Read-only file system" in found["message"]
        assert found["resumed"] == "step1"


@pytest.mark.parametrize("stage", range(1, 4))
def test_an_error_of_one_rank_is_raised_on_all(stage: int) -> None:
    ranks = seen("one-rank-fails")
    for rank in ranks:
        error, names, again = rank[f"zero{stage}"]
        assert error.startswith("rank 1: the checkpoint could not be written to "), error
        assert "PyTorch's writer failed" in error
        assert names == ["step1"]
        assert again == ""


def test_an_error_of_one_rank_of_any_type_is_raised_on_all() -> None:
    assert seen("one-rank-raises") == ["rank 1: KeyError: 'unforeseen'"] * 2


def test_what_cannot_be_made_whole_is_refused_by_name() -> None:
    parts: dict[str, Any] = {
        "writer": "DeepSpeed's FastCheckpointEngine",
        "node local": '"use_node_local_storage"',
        "client state": "argparse.Namespace",
        "tag": "tag='best' must be a name that ends in a number",
        "keep": "keep=0",
    }
    for found in seen("refused"):
        for name, part in parts.items():
            assert part in found[name], name
        assert found["written"] == ""
