"""The small examples run as they are, and learn; tests/pretrain has the large one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from alto_ds.compare.search import make_search
from alto_ds.compare.spec import read_spec
from tests.launcher import ROOT


@pytest.mark.parametrize(("script", "fall"), [("second_order.py", 0.7), ("zeroth_order.py", 0.2)])
def test_e_in_front_of_estimates_lowers_the_loss(script: str, fall: float) -> None:
    pytest.importorskip("transformers")
    printed = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    pairs = re.findall(r"loss ([\d.]+) at first, ([\d.]+) over", printed)
    assert len(pairs) == 2
    assert all(float(last) < float(first) - fall for first, last in pairs), printed


def test_each_comparison_of_the_study_gives_all_optimizers_the_trials_that_it_says() -> None:
    specs = ROOT / "examples" / "study" / "specs"
    shared = {"text.yaml", "four.yaml", "vision.yaml"}
    for path in sorted(specs.glob("*.yaml")):
        if path.name in shared:
            continue
        spec = read_spec(path)
        assert len(spec.seeds) >= 5, path.name
        for name, entry in spec.optimizers.items():
            assert len(make_search(entry, spec.search).ask()) == spec.search.trials, (path, name)
