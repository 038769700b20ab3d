"""Randomly damaged checkpoints: loading raises an error of this library or gives the same tensors, within limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = int(os.environ.get("CNVZOO_FUZZ_CASES", "700"))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux'")
def test_mutated_checkpoints() -> None:
    """See fuzzing.py; CNVZOO_FUZZ_CASES runs more of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("fuzzing.py")), str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + CASES / 20)
    assert done.returncode == 0, done.stderr[-5000:]
    counts = json.loads(done.stdout)
    assert sum(counts.values()) == CASES
    # both outcomes have to be frequent: otherwise the mutations test too little
    assert counts["refused, own"] > CASES / 3
    assert counts["refused, published"] > CASES / 5
    assert counts["loaded as it is written"] > CASES / 30
