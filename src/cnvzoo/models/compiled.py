"""Elementwise loops and row sums, compiled: one pass over memory for what would be a chain of operations.

Bits must not depend on what the process did before. So each variant has a code object of its own, and with it a
cache of the compiler's of its own, and is compiled at once for a given shape rather than for the one that
comes first.
"""

from __future__ import annotations

import functools
import os
import shutil
import types
from collections.abc import Callable
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
    return device.type == "cpu" and _has_compiler(os.environ.get("CXX"))


@functools.cache
def _has_compiler(named: str | None) -> bool:
    return any(map(shutil.which, [named] if named else ["g++", "clang++"]))


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
    compiled = torch.compile(own, dynamic=True, options=_FUSE_EVERYTHING)
    compiled(*example)
    return compiled
