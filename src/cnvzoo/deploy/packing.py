"""Integer weights in as few bytes as they have values, unpacked by ONNX operators that fold when a session loads.

A byte tells 256 combinations apart: eight weights of two values, five of three (2 bits), three of six, two of up to
sixteen (4 bits), one of more. It is the index of a row in a table that holds these weights as int8, so unpacking is
one Gather, of opset 13, and a tensor that is constant: ONNX Runtime computes it once and goes on as with int8 weights.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray


def pack(weight: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.int8]] | None:
    """(bytes [n], table int8 [rows, weights in a byte]) of a weight of any shape; None where bytes cannot be saved.

    `table[bytes].reshape(-1)` starts with the weights in row-major order; what is beyond them is padding.
    """
    values = np.unique(weight)
    count = max((n for n in range(1, 9) if len(values) ** n <= 256), default=1)
    if count == 1:
        return None
    table = np.array(list(itertools.product(values, repeat=count)), np.int8)
    digits = np.searchsorted(values, weight.reshape(-1))
    digits = np.pad(digits, (0, -len(digits) % count)).reshape(-1, count)
    powers = len(values) ** np.arange(count - 1, -1, -1)
    return (digits @ powers).astype(np.uint8), table
