"""Integers of 1 to 8 bits without a gap between them: a 2-bit weight takes 2 bits.

Value k takes the bits k*b to k*b + b - 1 of the stream, its lowest bit first; bit j of the stream is bit j % 8 of
byte j // 8. Values are in two's complement; binary ones are 0 for -1 and 1 for +1. The bits that fill the last byte
are zero. So each sequence of values has one packed form only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnvzoo.models.fake_quant import IntRange


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Integers (any shape, taken in C order) to bytes [packed_size].

    Raises:
        ValueError: a value that signed symmetric (at 1 bit: binary) integers of `bits` bits do not have.
    """
    ints, flat = IntRange.of(bits, signed=True), values.reshape(-1)
    if not _in_range(flat, ints):
        raise ValueError(f"values from {flat.min()} to {flat.max()} are not those of {bits} bits")
    codes = (flat > 0).astype(np.uint8) if ints.binary else flat.view(np.uint8)
    stream = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """The inverse of `pack`: bytes to `count` integers, [count].

    Raises:
        ValueError: bytes that `pack` does not give: too many or too few, a value out of range, filling that is not 0.
    """
    if data.shape != (packed_size(count, bits),):
        raise ValueError(f"{count} values of {bits} bits take {packed_size(count, bits)} bytes, not {data.size}")
    ints = IntRange.of(bits, signed=True)
    stream = np.unpackbits(data, bitorder="little")
    if stream[count * bits :].any():
        raise ValueError("the bits after the last value are not zero")
    codes = np.empty((count, 8), np.uint8)
    codes[:, :bits] = stream[: count * bits].reshape(count, bits)
    if ints.binary:
        return codes[:, 0].view(np.int8) * np.int8(2) - np.int8(1)
    codes[:, bits:] = codes[:, bits - 1 : bits]  # the sign
    values: NDArray[Any] = np.packbits(codes, bitorder="little").view(np.int8)
    if not _in_range(values, ints):
        raise ValueError(f"a value below {ints.low}, which {bits} bits, symmetric, do not have")
    return values


def _in_range(values: NDArray[np.int8], ints: IntRange) -> bool:
    if ints.binary:
        return bool((np.abs(values) == 1).all())
    return not values.size or bool(values.min() >= ints.low and values.max() <= ints.high)
