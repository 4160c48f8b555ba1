"""Scripts that pass their own optimizer to DeepSpeed, with ALTO or E in its config."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests import launcher

pytest.importorskip("deepspeed")

RANKS = 2
WEIGHTS = ["0.weight", "2.weight", "4.weight"]  # the biases' group has no weight decay


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found of all cases of ``pass_own_optimizer.py``."""
    folder = tmp_path_factory.mktemp("engines")
    script = ["tests/scripts/pass_own_optimizer.py", str(folder)]
    output = launcher.run(RANKS, "--module", "alto_ds.run", *script, folder=folder)
    found = [folder / f"{rank}.json" for rank in range(RANKS)]
    assert all(path.exists() for path in found), output[-3000:]
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.parametrize("case", ["zero1", "zero2", "E", "function"])
def test_what_replaces_the_scripts_optimizer_trains_as_if_it_had_been_passed(
    engines: Any, case: str
) -> None:
    for rank in engines:
        found, expected = rank[case], rank[f"{case} directly"]
        assert found["optimizer"] == expected["optimizer"] == ("E" if case == "E" else "ALTO")
        assert not found["is passed"]
        assert found["keys"] == expected["keys"]
        assert found["written"] == expected["written"]
        assert found["losses"] == expected["losses"]
        assert found["weights"] == expected["weights"]  # to the bit
        assert found["weights"] != rank["other"]["weights"]
    assert engines[0][case]["weights"] == engines[1][case]["weights"]


def test_the_scripts_schedule_goes_on_in_the_same_groups(engines: Any) -> None:
    for case in ("zero1", "zero2", "E"):
        assert engines[0][case]["same dicts"] == [True, True]
        assert not engines[0][case]["warned"]
    rates = [groups[0][0] for groups in engines[0]["zero1"]["written"]]
    assert rates == pytest.approx([0.01, 0.015, 0.02, 0.02, 0.02, 0.02])
    for step, groups in enumerate(engines[0]["zero2"]["written"], 1):
        decayed, undecayed = (tuple(group) for group in groups)
        rate = 0.02 * min(1, step / 3)
        assert decayed == pytest.approx((rate, 0.1 * (1 + step)))
        assert undecayed == pytest.approx((rate / 2, 0))


def test_an_undecayed_group_stays_undecayed_and_unscaled(engines: Any) -> None:
    for case in ("zero1", "zero2", "function"):
        assert engines[0][case]["scaled"] == WEIGHTS
    assert [group[1] for group in engines[0]["function"]["written"][-1]] == [0.1, 0]


@pytest.mark.parametrize("case", ["args", "config_params"])
def test_the_config_is_found_wherever_it_is_passed(engines: Any, case: str) -> None:
    assert engines[0][case]["weights"] == engines[0]["zero1"]["weights"]


def test_auto_is_of_the_configs_global_batch(engines: Any) -> None:
    assert engines[0]["auto"]["settings"] == [0.5, [0.01, 0.9, 0.99]]


def test_rank_0_says_in_one_line_what_was_replaced_and_what_is_not_used(engines: Any) -> None:
    (line,) = engines[0]["zero1"]["said"]
    assert "ALTO, which the config names, replaces Adam" in line
    assert "lr and weight_decay stay those of the script's parameter groups" in line
    assert line.endswith(
        "not used: the config's lr=7.0, the config's weight_decay=0.7, "
        "Adam's betas=(0.9, 0.999), Adam's eps=1e-08."
    )
    (line,) = engines[0]["E"]["said"]
    assert "E, which the config names, replaces Adam" in line
    assert not any(found["said"] for found in engines[1].values())


def test_a_config_that_names_another_leaves_the_scripts_optimizer_alone(engines: Any) -> None:
    for rank in engines:
        found = rank["other"]
        assert found["optimizer"] == "Adam"
        assert found["is passed"]
        assert "eps" in found["keys"]
        assert not found["said"] + found["warned"]


def test_an_alto_of_the_scripts_is_left_alone_and_the_configs_settings_are_said_to_be_unused(
    engines: Any,
) -> None:
    found = engines[0]["own"]
    assert found["is passed"]
    assert found["weights"] == engines[0]["zero1"]["weights"]
    assert found["said"] == [
        "alto_ds.run: the script passes ALTO itself, so the settings of "
        '"optimizer" in the config are not used.'
    ]


@pytest.mark.parametrize(("case", "name"), [("imported", "ALTO"), ("imported, E", "E")])
def test_importing_alto_ds_replaces_nothing_and_warns_once(
    engines: Any, case: str, name: str
) -> None:
    assert all(rank[case]["is passed"] and rank[case]["optimizer"] == "Adam" for rank in engines)
    (warning,) = engines[0][case]["warned"]
    assert f'the DeepSpeed config names "{name}", but this engine trains with Adam' in warning
    assert "alto_ds.run SCRIPT.py" in warning
    assert not engines[1][case]["warned"]


@pytest.mark.parametrize("case", ["imported, own", "imported, other", "zero1", "E", "own"])
def test_engines_that_train_with_what_they_should_are_not_warned_of(
    engines: Any, case: str
) -> None:
    assert not any(rank[case]["warned"] for rank in engines)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("states", r"Adam.* has states already \(exp_avg, exp_avg_sq, step\), and ALTO"),
        ("states, function", r"Adam.* has states already \(exp_avg, exp_avg_sq, step\)"),
        ("momentum", "writes the momentum of Adam.*Write cycle_momentum=False"),
        ("auto without a size", '"train_batch_size": None in the config must be a number'),
    ],
)
def test_what_cannot_be_replaced_is_refused_on_all_ranks(
    engines: Any, case: str, message: str
) -> None:
    for rank in engines:
        error = rank[case]["error"]
        assert re.search(message, error), error
        assert "\n" not in error
