"""The machine: which device, what to call it in a record, and the settings under which a seed gives the same bits."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cnvzoo.errors import CnvzooError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises CnvzooError for a device that is not there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CnvzooError(f"device {str(device)!r} cannot be used ({reason}): use auto, cpu or cuda") from None
    return resolved


def describe_device(device: torch.device) -> dict[str, Any]:
    """kind, name, and on a CPU the threads and instruction set, which the bits of a run depend on."""
    if device.type == "cuda":
        return {"kind": "cuda", "name": torch.cuda.get_device_name(device)}
    return {
        "kind": device.type,
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels and full float32 (no TF32) inside; the settings are put back."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
    cudnn: Any = torch.backends.cudnn
    fills: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.allow_tf32
    filled = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.allow_tf32 = False, False
    fills.fill_uninitialized_memory = False  # every kernel here writes all of its result: filling it first is lost time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, cudnn.allow_tf32 = before[1:]
        fills.fill_uninitialized_memory = filled


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors: a CPU step spends up to a third of its time in page faults else."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
