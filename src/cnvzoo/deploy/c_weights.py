"""Rows of integer weights as bytes, for the C code: five ternary weights in a byte, or at their bit width."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_TERNARY_BITS = 2  # weights of 2 bits are -1, 0 and 1
_PARTS = (4, 2, 1)  # bits that divide a byte


def pack_rows(rows: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Rows of weights [count, n] to bytes [count, bytes].

    A byte holds weights that are `bytes` apart, so that unpacking is a loop without dependencies.

    Args:
        rows: -1 or 1 for 1 bit, else -(2^(bits-1) - 1) to 2^(bits-1) - 1. In a layer of 1 bit, rows of zeros, whose
            channels have the same level for every sum, are stored as ones.
        bits: 1 to 8.
    """
    values = rows.astype(np.int64)
    if bits == 8:
        return rows.view(np.uint8)
    if bits == _TERNARY_BITS:
        digits = _planes(values + 1, 5, fill=1)
        number = (digits * 3 ** np.arange(4, -1, -1)[:, None]).sum(1)
        return (-(-number * 256 // 243)).astype(np.uint8)
    if bits == 1:
        codes = ((np.where(values == 0, 1, values) + 1) // 2).astype(np.int64)
    else:
        codes = values + (1 << (bits - 1)) - 1
    parts, up = [], 0
    for part in _PARTS:
        if bits & part:
            planes = _planes((codes >> up) & ((1 << part) - 1), 8 // part, fill=0)
            parts.append((planes << (part * np.arange(8 // part))[:, None]).sum(1))
            up += part
    return np.concatenate(parts, 1).astype(np.uint8)


def _planes(codes: NDArray[Any], in_byte: int, *, fill: int) -> NDArray[Any]:
    """Codes [count, n] as [count, in_byte, bytes], padded."""
    size = -(-codes.shape[1] // in_byte)
    padded = np.pad(codes, ((0, 0), (0, size * in_byte - codes.shape[1])), constant_values=fill)
    return padded.reshape(len(codes), in_byte, size)
