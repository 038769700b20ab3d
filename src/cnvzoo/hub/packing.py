"""Integers of 1 to 8 bits without a gap between them: a 2-bit weight takes 2 bits.

Value k takes the bits k*b to k*b + b - 1 of the stream, its lowest bit first; bit j of the stream is bit j % 8 of
byte j // 8. Values are in two's complement; binary ones are 0 for -1 and 1 for +1. The bits that fill the last byte
are zero. So each sequence of values has one packed form only.
"""

from __future__ import annotations

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
    ints, count = IntRange.of(bits, signed=True), values.size
    if not _in_range(values, ints):
        raise ValueError(f"values from {values.min()} to {values.max()} are not those of {bits} bits")
    codes = np.zeros((-(-count // 8), 8), np.uint64)
    codes.reshape(-1)[:count] = (values > 0 if ints.binary else values.view(np.uint8) & (2**bits - 1)).reshape(-1)
    words = np.bitwise_or.reduce(codes << _shifts(bits), axis=1).astype("<u8")
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: packed_size(count, bits)]


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """The inverse of `pack`: bytes to `count` integers, [count].

    Raises:
        ValueError: bytes that `pack` does not give: too many or too few, a value out of range, filling that is not 0.
    """
    if data.shape != (packed_size(count, bits),):
        raise ValueError(f"{count} values of {bits} bits take {packed_size(count, bits)} bytes, not {data.size}")
    if (used := count * bits % 8) and data[-1] >> used:
        raise ValueError("the bits after the last value are not zero")
    groups = -(-count // 8)  # 8 values take as many bytes as one has bits, and fit into a word
    stream = np.zeros(groups * bits, np.uint8)
    stream[: data.size] = data
    words = np.zeros((groups, 8), np.uint8)
    words[:, :bits] = stream.reshape(groups, bits)
    codes = ((words.view("<u8") >> _shifts(bits)) & np.uint64(2**bits - 1)).astype(np.uint8).reshape(-1)[:count]
    ints = IntRange.of(bits, signed=True)
    if ints.binary:
        return codes.view(np.int8) * np.int8(2) - np.int8(1)
    values = (codes << (8 - bits)).view(np.int8) >> (8 - bits)  # the second shift repeats the sign
    if not _in_range(values, ints):
        raise ValueError(f"a value below {ints.low}, which symmetric integers of {bits} bits do not have")
    return values


def _shifts(bits: int) -> NDArray[np.uint64]:
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)


def _in_range(values: NDArray[np.int8], ints: IntRange) -> bool:
    if ints.binary:
        return bool((np.abs(values) == 1).all())
    return not values.size or bool(values.min() >= ints.low and values.max() <= ints.high)
