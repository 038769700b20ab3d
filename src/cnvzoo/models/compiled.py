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
import types
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
    """Whether training on `device` runs the loops of this library compiled, for all but small tensors."""
    return device.type == "cpu" and _compiler(os.environ.get("CXX")) is not None


@functools.cache
def _compiler(named: str | None) -> str | None:
    """The C++ compiler on this machine: the command that is named, which may have arguments, else the usual ones."""
    candidates = [named] if named and named.strip() else ["g++", "clang++"]
    return next((command for command in candidates if shutil.which(shlex.split(command)[0])), None)


def runs_compiled(x: Tensor) -> bool:
    """Whether loops over x run compiled: not where the whole model is being compiled or exported, which fuses too."""
    return not torch.compiler.is_compiling() and x.numel() >= WORTH_COMPILING and compiles(x.device)


def compiled_for(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """Compile `function` and run it on `example`, whose tensors stand for those of any other sizes.

    Sizes of the example that differ stay free of each other, and a size of 1 stays 1. A dimension that is to be
    fixed is marked by the caller with `torch._dynamo.mark_static`.
    """
    code = function.__code__.replace(co_name=f"{function.__name__.strip('_')}_kernel")
    own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    # by itself torch takes g++, or what CXX was when its compiler was loaded, which may be long ago
    options: dict[str, Any] = _FUSE_EVERYTHING | {"cpp.cxx": (None, _compiler(os.environ.get("CXX")))}
    compiled = torch.compile(own, dynamic=True, options=options)
    with _sparing_the_compiler():
        compiled(*example)
    return compiled


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
