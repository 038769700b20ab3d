"""The machine that figures are of, and what of it a training step could use at best."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from cnvzoo.train.device import describe_device

_SIZES = {"cpu": 2048, "cuda": 8192}


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, as a record has them."""
    return {**describe_device(device), "torch": torch.__version__}


def matmul_rate(device: torch.device, repeats: int = 15) -> float:
    """Of the product of two large square bfloat16 matrices: operations a second, the median of `repeats`."""
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
