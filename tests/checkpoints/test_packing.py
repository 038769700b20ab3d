"""Packed integers: the bits are those of the format's description, and other byte strings are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnvzoo.checkpoints.weights import pack, packed_size, unpack


def levels(bits: int) -> list[int]:
    return [-1, 1] if bits == 1 else list(range(1 - 2 ** (bits - 1), 2 ** (bits - 1)))


def by_hand(values: list[int], bits: int) -> bytes:
    """Pack values as the format's description says, by way of one long integer."""
    stream = 0
    for k, value in enumerate(values):
        code = int(value > 0) if bits == 1 else value % 2**bits
        stream |= code << (k * bits)
    return stream.to_bytes(-(-len(values) * bits // 8), "little")


values_and_bits = st.integers(1, 8).flatmap(
    lambda bits: st.tuples(st.lists(st.sampled_from(levels(bits)), max_size=40), st.just(bits))
)


@given(values_and_bits)
def test_bytes_are_those_of_the_description(case: tuple[list[int], int]) -> None:
    values, bits = case
    packed = pack(np.array(values, np.int8), bits)
    assert packed.tobytes() == by_hand(values, bits)
    assert packed.size == packed_size(len(values), bits)
    assert unpack(packed, bits, len(values)).tolist() == values


def test_a_worked_example() -> None:
    assert pack(np.array([1, -1, 0, 1], np.int8), 2).tolist() == [0b01_00_11_01]
    assert pack(np.array([[-1, 1], [1, 1]], np.int8), 1).tolist() == [0b1110]
    assert pack(np.array([-127, 3], np.int8), 8).tolist() == [0x81, 3]
    assert pack(np.array([3, -3, 1], np.int8), 3).tolist() == [0b01_101_011, 0b0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_byte_string_is_either_refused_or_packed_again_to_itself(bits: int) -> None:
    """So no two byte strings mean the same values, and a flipped bit is always found."""
    count = 3
    accepted = 0
    for number in range(0, 2 ** min(16, 8 * packed_size(count, bits)), 1 if bits < 5 else 37):
        data = np.frombuffer(number.to_bytes(packed_size(count, bits), "little"), np.uint8)
        try:
            values = unpack(data, bits, count)
        except ValueError:
            continue
        accepted += 1
        assert set(values.tolist()) <= set(levels(bits))
        assert pack(values, bits).tolist() == data.tolist()
    if bits < 5:
        assert accepted == len(levels(bits)) ** count


@pytest.mark.parametrize("bits", range(1, 9))
def test_values_of_other_bits_are_refused(bits: int) -> None:
    for value in {levels(bits)[0] - 1, levels(bits)[-1] + 1, 0 if bits == 1 else -128} & set(range(-128, 128)):
        with pytest.raises(ValueError, match=rf"{bits} bits"):
            pack(np.array([1, value], np.int8), bits)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_another_number_of_bytes_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"5 values of 3 bits take 2 bytes, not {size}"):
        unpack(np.zeros(size, np.uint8), 3, 5)
