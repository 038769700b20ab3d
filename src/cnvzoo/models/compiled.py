"""Compilation of elementwise operations and row sums into one loop, which reads and writes memory once.

The bits of a loop must not depend on what the process computed before. torch.compile keeps its variants per code
object and specializes them for the shapes that come first. So each loop has a code object of its own, and is compiled
at once for an example of fixed shape.
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

# Number of values from which a tensor goes through a compiled loop. For sizes below a few thousand the compiler also
# makes another variant, with other bits.
WORTH_COMPILING = 1 << 14

# The largest integer of the quantizer in the examples of `compiled_for`. An integer of an example is an argument of the
# loop, so that networks of all bit widths share the loops that they compile.
EXAMPLE_HIGH = 255

# Intermediate tensors are never stored: computing a value twice is faster than writing and reading it.
_FUSE_EVERYTHING: dict[str, Any] = {
    "realize_opcount_threshold": 1 << 30,
    "realize_reads_threshold": 1 << 30,
    "realize_acc_reads_threshold": 1 << 30,
    "realize_acc_reads_size_threshold": 1 << 40,
}


def compiles(device: torch.device) -> bool:
    """Whether training on `device` runs the loops of this library compiled, except for small tensors.

    False on other devices than CPUs, where torch.compile is disabled (`TORCHDYNAMO_DISABLE=1`), and where no C++
    compiler works. The compiler is tried once per process; a warning says why it does not work.
    """
    return device.type == "cpu" and not _is_disabled() and _working_compiler(os.environ.get("CXX")) is not None


def compiler_version() -> str | None:
    """The C++ compiler of the loops by its `--version`, such as `g++ (Debian 12.2.0-14) 12.2.0`; None without one."""
    command = _working_compiler(os.environ.get("CXX"))
    return None if command is None else _version_of(command)


def _is_disabled() -> bool:
    """Whether one of the two environment variables that torch reads disables torch.compile."""
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
    """The command of a C++ compiler that exists: `named`, which may have arguments, or g++ or clang++ by default."""
    candidates = [named] if named and named.strip() else ["g++", "clang++"]
    try:
        return next((command for command in candidates if shutil.which(shlex.split(command)[0])), None)
    except ValueError:  # a quotation mark without its pair
        return None


@functools.cache
def _working_compiler(named: str | None) -> str | None:
    """The command of the compiler if a loop compiled with it runs here.

    It may lack Python's headers, or the cache of compiled loops may be on a file system mounted noexec.
    """
    command = _compiler(named)
    if command is None:
        if named and named.strip():
            warnings.warn(f"CXX={named}: no such command, so training on the CPU runs uncompiled.", stacklevel=2)
        return None
    try:
        with sigint_blocked():
            _compile(_example, command)(torch.zeros(2, 64))
    except Exception as error:  # torch.compile raises errors of many classes; training works without it
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        warnings.warn(
            f"a loop compiled with the C++ compiler {command} does not run ({type(error).__name__}: {reason[:200]}), "
            "so training on the CPU runs uncompiled: slower, and with other bits. Set CXX to a compiler that has "
            "Python's headers, and TORCHINDUCTOR_CACHE_DIR to a folder whose files may be executed.",
            stacklevel=2,
        )
        return None
    return command


def _example(x: Tensor) -> Tensor:
    return (x * 2 + 1).sum(1)


def runs_compiled(x: Tensor) -> bool:
    """Whether loops over x run compiled: not for small x, nor while the whole model is compiled or exported."""
    return not torch.compiler.is_compiling() and x.numel() >= WORTH_COMPILING and compiles(x.device)


def compiled_for(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """Compile `function` for tensors of any sizes, by running it once on `example`.

    Equal sizes in the example have to be equal in later calls too, and a size of 1 stays 1; integers of the example may
    be others in later calls. The caller fixes a dimension by `torch._dynamo.mark_static`.
    """
    compiled = _compile(function, _working_compiler(os.environ.get("CXX")))
    with sigint_blocked():
        compiled(*example)
    return compiled


def _compile(function: Callable[..., Any], compiler: str | None) -> Callable[..., Any]:
    code = function.__code__.replace(co_name=f"{function.__name__.strip('_')}_kernel")
    own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    # by default torch takes the value that CXX had when Inductor was imported
    options: dict[str, Any] = _FUSE_EVERYTHING | {"cpp.cxx": (None, compiler)}
    compiled = torch.compile(own, dynamic=True, options=options)
    # Inductor's cache on disk does not distinguish instruction sets: C++ generated for AVX512 would be compiled for
    # AVX2, and read and write beyond its vectors. The tag is set for every call, since any call may compile for further
    # sizes.
    tag = f"{torch.compiler.config.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"

    def call(*arguments: Any) -> Any:
        config: Any = torch.compiler.config
        before = config.cache_key_tag
        # not `config.patch`, which defines a class in every call: a training step makes hundreds of calls
        config.cache_key_tag = tag
        try:
            return compiled(*arguments)
        finally:
            config.cache_key_tag = before

    return call


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block SIGINT in this thread and in the processes that it starts, which inherit the mask.

    A terminal sends Ctrl-C to child processes too. If it ended a C++ compiler, the step would fail; if it ended one
    that torch runs to find out the instruction set, the loops would be compiled for an older CPU and have other bits.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
