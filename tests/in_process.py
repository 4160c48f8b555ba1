"""Commands in the process of the tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


def call(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> SimpleNamespace:
    """Run a command; what it prints, ``out`` and ``err``, and its exit ``status``."""
    monkeypatch.setattr("sys.argv", ["command", *words])
    status: Any = 0
    try:
        module.main()
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return SimpleNamespace(out=printed.out, err=printed.err, status=status)
