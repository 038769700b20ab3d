"""`benchmarks/` is a folder of scripts, not a package: its modules are found as for a script that runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "speed"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from harness import outputs, plot
from workbench import FLOAT, QUANTIZED, Bench


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `own_process` by a pytest of its own.

    OpenVINO's Core replaces the alternate signal stack of the thread that makes it. If the garbage collector frees the
    Core in another thread, the stack is unmapped but still in use: the next signal that Python handles, SIGINT in the
    tests of training, is a segmentation fault.
    """
    if pyfuncitem.get_closest_marker("own_process") is None or "CNVZOO_OWN_PROCESS" in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = os.environ | {"CNVZOO_OWN_PROCESS": "1"}
    done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Without drawing plots, which takes most of the time; test_plot.py has its own fixture."""
    monkeypatch.setattr(plot, "draw", lambda points, path: None)
    return Bench(tmp_path)


@pytest.fixture
def no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is written: that takes most of the time, and test_checkpoints.py tests it."""
    monkeypatch.setattr(outputs, "keep_missing", lambda *_: [])


@pytest.fixture
def float_and_quantized(bench: Bench) -> Bench:
    """A float entry and a quantized one that starts from it."""
    bench.recipe(FLOAT)
    bench.recipe(QUANTIZED, float_start=FLOAT)
    return bench
