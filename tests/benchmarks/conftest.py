"""`benchmarks/` is a folder of scripts, not a package: its modules are found as for a script that runs there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from harness import plot
from workbench import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Without the picture, which takes longer than all the rest; test_plot.py has its own."""
    monkeypatch.setattr(plot, "draw", lambda points, path: None)
    return Bench(tmp_path)
