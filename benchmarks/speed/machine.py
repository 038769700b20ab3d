"""The machine and the versions that figures were measured with, and the rate of a matrix product on it."""

from __future__ import annotations

import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from cnvzoo.training.device import describe_device

_SIZES = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices


def describe(device: torch.device) -> dict[str, Any]:
    """Kind, name, threads and instruction set of the device as in a run record, and the version of torch."""
    return {**describe_device(device), "torch": torch.__version__}


def in_words(facts: dict[str, Any]) -> str:
    """What `describe` returned, as text, without the version of torch: "AMD EPYC, 2 threads, AVX512"."""
    cpu = f", {facts['threads']} threads, {facts['capability']}" if facts["kind"] == "cpu" else ""
    return f"{facts['name']}{cpu}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def matmul_rate(device: torch.device, repeats: int = 15) -> float:
    """Operations a second of the product of two large square bfloat16 matrices, the median of `repeats`."""
    size = _SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:])


def wait(device: torch.device) -> None:
    """Until all work handed to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
