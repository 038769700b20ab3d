"""Elementwise loops and row sums, compiled: one pass over memory for what would be a chain of operations.

Bits must not depend on what the process did before. So each variant has a code object of its own, and with it a
cache of the compiler's of its own, and is compiled at once for a given shape rather than for the one that
comes first.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# values of a tensor; below a few thousand, the compiler would also make another variant with other bits
WORTH_COMPILING = 1 << 14

# never keep an intermediate of a tensor's size: computing it twice is faster than writing and reading it
_FUSE_EVERYTHING: dict[str, Any] = {
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    "realize_acc_reads_threshold": 1 << 30,
    "realize_acc_reads_size_threshold": 1 << 40,
}


def compiles(device: torch.device) -> bool:
    """Whether training on `device` runs the loops of this library compiled, for all but small tensors.

    False where torch.compile is disabled (`TORCHDYNAMO_DISABLE=1`), and where no C++ compiler gives a loop that runs,
    which is tried once and said in a warning.
    """
    return device.type == "cpu" and not _is_disabled() and _working_compiler(os.environ.get("CXX")) is not None


def compiler_version() -> str | None:
    """The C++ compiler of the loops, as it names itself: `g++ (Debian 12.2.0-14) 12.2.0`; None without one."""
    command = _working_compiler(os.environ.get("CXX"))
    return None if command is None else _version_of(command)


def _is_disabled() -> bool:
    """Whether torch.compile hands functions back uncompiled, by the two variables that torch reads for that."""
    return os.environ.get("TORCHDYNAMO_DISABLE") == "1" or os.environ.get("TORCH_COMPILE_DISABLE") == "1"


@functools.cache
def _version_of(command: str) -> str:
    try:
        shown = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return command
    return shown.stdout.splitlines()[0].strip() if shown.stdout.strip() else command


def _compiler(named: str | None) -> str | None:
    """The C++ compiler on this machine: the command that is named, which may have arguments, else the usual ones."""
    candidates = [named] if named and named.strip() else ["g++", "clang++"]
    return next((command for command in candidates if shutil.which(shlex.split(command)[0])), None)


@functools.cache
def _working_compiler(named: str | None) -> str | None:
    """The compiler, if a loop that it makes runs here: it may lack Python's headers, and its cache may be noexec."""
    command = _compiler(named)
    if command is None:
        if named and named.strip():
            warnings.warn(f"CXX={named}: no such command, so training on the CPU runs uncompiled.", stacklevel=2)
        return None
    try:
        with _sparing_the_compiler():
            _compile(_example, command)(torch.zeros(2, 64))
    except Exception as error:  # whatever torch.compile raises: training goes on without it
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        warnings.warn(
            f"the C++ compiler {command} gives no loop that runs ({type(error).__name__}: {reason[:200]}), so "
            "training on the CPU runs uncompiled: slower, and with other bits. Set CXX to a compiler that has Python's "
            "headers, and TORCHINDUCTOR_CACHE_DIR to a folder whose files may be executed.",
            stacklevel=2,
        )
        return None
    return command


def _example(x: Tensor) -> Tensor:
    return (x * 2 + 1).sum(1)


def runs_compiled(x: Tensor) -> bool:
    """Whether loops over x run compiled: not where the whole model is being compiled or exported, which fuses too."""
    return not torch.compiler.is_compiling() and x.numel() >= WORTH_COMPILING and compiles(x.device)


def compiled_for(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """Compile `function` and run it on `example`, whose tensors stand for those of any other sizes.

    Sizes of the example that differ stay free of each other, and a size of 1 stays 1. A dimension that is to be
    fixed is marked by the caller with `torch._dynamo.mark_static`.
    """
    compiled = _compile(function, _working_compiler(os.environ.get("CXX")))
    with _sparing_the_compiler():
        compiled(*example)
    return compiled


def _compile(function: Callable[..., Any], compiler: str | None) -> Callable[..., Any]:
    code = function.__code__.replace(co_name=f"{function.__name__.strip('_')}_kernel")
    own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    # by itself torch takes g++, or what CXX was when its compiler was loaded, which may be long ago
    options: dict[str, Any] = _FUSE_EVERYTHING | {"cpp.cxx": (None, compiler)}
    compiled = torch.compile(own, dynamic=True, options=options)
    # The compiler's cache on disk does not tell instruction sets apart: a loop written for AVX512 would be compiled for
    # AVX2, and read and write past its vectors. Set around every call, because any may compile for further sizes.
    tag = f"{torch.compiler.config.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"

    def call(*arguments: Any) -> Any:
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]  (of its config module)
            return compiled(*arguments)

    return call


@contextmanager
def _sparing_the_compiler() -> Iterator[None]:
    """Have the processes that this thread starts not see SIGINT.

    A terminal sends Ctrl-C to them too. A C++ compiler that it ends is an error in the middle of a step or, where torch
    tries what the CPU can do, means loops for an older CPU, and so other bits.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
