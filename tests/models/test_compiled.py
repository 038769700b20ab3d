"""How loops are compiled: by a compiler that exists on the machine, and that Ctrl-C does not end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from cnvzoo.models import compiled


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], dict[str, Any]]:
    """`compiling(act)`: compile a loop, for which `act` is called in the place of torch's compiler; what that gets."""

    def call(act: Callable[[], object]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        monkeypatch.setattr(torch, "compile", lambda function, **options: given.update(options) or (lambda *_: act()))
        compiled.compiled_for(double, torch.ones(3))
        return given["options"]

    return call


@pytest.mark.parametrize(
    ("there", "named", "chosen"),
    [
        (["g++", "clang++"], None, "g++"),
        (["clang++"], None, "clang++"),
        (["clang++"], "", "clang++"),
        (["g++", "mine"], "mine", "mine"),
        (["g++", "cache"], "cache g++ -v", "cache g++ -v"),
        (["g++"], "none", None),
        (["g++"], 'g++ "x', None),
        ([], None, None),
    ],
)
def test_the_compiler_is_one_that_exists(monkeypatch, tmp_path, compiling, there, named, chosen):
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    compiled._working_compiler.cache_clear()
    try:
        warning = re.escape(f"CXX={named}: no such command")
        with nullcontext() if chosen or not named else pytest.warns(UserWarning, match=warning):
            assert compiling(lambda: None)["cpp.cxx"] == (None, chosen)
        assert compiled.compiles(torch.device("cpu")) == (chosen is not None)
    finally:
        compiled._working_compiler.cache_clear()


def test_a_compiler_that_does_not_work_gives_one_warning(monkeypatch, tmp_path):
    """Such as one without Python's headers, or with a cache on a file system whose files may not be executed."""

    def fail() -> None:
        raise OSError("failed to map segment from shared object")

    compiled._working_compiler.cache_clear()
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++ -nostdinc")
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *_: fail())
    try:
        with pytest.warns(UserWarning, match="-nostdinc does not run .OSError: failed to map segment"):
            assert not compiled.compiles(torch.device("cpu"))
        assert not compiled.compiles(torch.device("cpu"))  # a second warning would be an error
    finally:
        compiled._working_compiler.cache_clear()


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_loops_are_not_compiled_if_torch_returns_them_unchanged(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert not compiled.compiles(torch.device("cpu"))


@pytest.mark.skipif(not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here to compile with")
def test_a_compiler_named_before_torchs_was_loaded_is_not_remembered():
    """One test without a compiler, or one cell of a notebook, must not affect later code in the process."""
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "none")}):  # monkeypatch would leave the setting hidden behind it
        loop = compiled.compiled_for(double, torch.ones(30, 40))
    assert torch.equal(loop(torch.full((50, 60), 3.0)), torch.full((50, 60), 6.0))


def test_loops_compiled_for_different_instruction_sets_have_different_caches(monkeypatch):
    """Otherwise a process with vectors of 8 would get a loop for vectors of 16 from the compiler's cache on disk.

    Every call may compile for further sizes, and not only the first.
    """
    tags: list[str] = []
    note = lambda *_: tags.append(torch.compiler.config.cache_key_tag)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda function, **_: note)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        compiled.compiled_for(double, torch.ones(3))(torch.ones(5))
    wide, narrow = tags[-4:-2], tags[-2:]
    assert wide[0] == wide[1] != narrow[0] == narrow[1]
    assert torch.compiler.config.cache_key_tag not in tags[-4:]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_other_processes_but_not_the_compiler(compiling):
    def interrupted() -> None:
        ended.append(subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode)

    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    ended: list[int] = []
    # a shell's background jobs ignore SIGINT, and so would what they start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        compiling(interrupted)
        interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended[0] == 0
    assert ended[1] != 0
