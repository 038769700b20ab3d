"""The description of the machine in a record: machines that give other bits have other descriptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

import cnvzoo
from cnvzoo.models.compiled import compiles
from cnvzoo.training.device import deterministic
from cnvzoo.training.numerics import Machine, describe_machine, describe_versions

CPU = torch.device("cpu")
DESCRIBE = """
import json, torch
from cnvzoo.training.device import deterministic
from cnvzoo.training.device import deterministic
from cnvzoo.training.numerics import describe_machine
torch.set_num_threads(1)
with deterministic(torch.device("cpu")):
    print(json.dumps(describe_machine(torch.device("cpu"))))
"""

wide_only = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not compiles(CPU),
    reason="needs AVX512, to be told apart from AVX2, and a C++ compiler",
)


def test_a_checkout_that_is_not_installed_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_others(package: str) -> str:
        if package == "cnvzoo":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("cnvzoo.training.numerics.version", of_others)
    assert describe_versions("cnv", CPU)["cnvzoo"] == cnvzoo.__version__


def described(**environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", DESCRIBE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The description of this machine with all its instruction sets enabled."""
    return described()


def test_a_machine_is_described_by_valid_fields_alike_every_time(whole: dict[str, Any]) -> None:
    assert Machine(**whole).model_dump(exclude_none=True) == whole
    assert (whole["kind"], whole["threads"]) == ("cpu", 1)
    assert ("compiler" in whole) == (whole["loops"] == "compiled")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with deterministic(CPU):
            assert describe_machine(CPU) == whole
    finally:
        torch.set_num_threads(before)


def test_the_random_state_of_the_caller_is_not_changed() -> None:
    before = torch.random.get_rng_state()
    describe_machine(CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_uncompiled_loops_are_recorded(uncompiled: None) -> None:
    with deterministic(CPU):
        machine = describe_machine(CPU)
    assert machine["loops"] == "eager"
    assert "compiler" not in machine


def test_loops_that_cannot_be_compiled_are_recorded() -> None:
    machine = described(CXX="/bin/false")
    assert machine["loops"] == "eager"
    assert "compiler" not in machine


@wide_only
def test_disabled_instruction_sets_give_another_description(whole: dict[str, Any]) -> None:
    held_back = described(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert (whole["capability"], held_back["capability"]) == ("AVX512", "AVX2")
    assert whole["onednn"].startswith("AVX512_CORE")
    assert held_back["onednn"] == "AVX2"
    assert held_back["kernels"] != whole["kernels"]
    assert (held_back["precision"], whole.get("precision")) == ("float32", None)
