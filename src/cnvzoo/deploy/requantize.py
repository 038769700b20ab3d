"""From accumulators to activations: the multiplier and the int32 bias of each channel, and how exact they are.

A trained layer gives level round(multiplier * acc + offset) of its activation quantizer for the integer accumulator
`acc`. The integer graph gives round(float32(gain * acc + bias) * float32 multiplier): its bias is a whole number. Both
are staircases in acc, so they are equal exactly where their steps are at the same accumulators. Here the bias and the
multiplier are chosen by that, and the accumulators where the staircases differ are counted: none, or next to none, if
the model's biases were quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnvzoo.models.quant import LARGEST_BIAS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_LEAST_MULTIPLIER = 1e-12  # of a channel whose level no input can change
_BIASES = (0, -1, 1)  # tried around the rounded bias


@dataclass(frozen=True)
class Staircase:
    """The exact layer, one row for each channel: level round(multiplier * acc + offset), clipped to 0..high.

    Attributes:
        multiplier: [channels], at least 0.
        offset: [channels].
        low_acc, high_acc: [channels], the least and the largest accumulator that any input can give.
        high: the highest level.
    """

    multiplier: Floats
    offset: Floats
    low_acc: Ints
    high_acc: Ints
    high: int


@dataclass(frozen=True)
class Requantization:
    """What the integer graph computes: level round(float32(gain * acc + bias) * multiplier), clipped to 0..high.

    Attributes:
        gain: by which the integer weights are multiplied.
        bias: int32 [channels].
        multiplier: float32 [channels].
        differing: int64 [channels], reachable accumulators whose level is not that of the exact layer.
        reachable: int64 [channels], how many there are.
    """

    gain: int
    bias: NDArray[np.int32]
    multiplier: NDArray[np.float32]
    differing: Ints
    reachable: Ints


def levels(acc: NDArray[Any], bias: NDArray[Any], multiplier: NDArray[np.float32], high: int) -> NDArray[np.uint8]:
    """The levels of accumulators that are `gain` times the plain ones; the arithmetic of the integer graph.

    int32 sum, rounded to float32 (half to even), times multiplier in float32, rounded half to even, clipped to 0..high.
    """
    product = (acc + bias).astype(np.int32).astype(np.float32) * multiplier
    return np.clip(np.rint(product), 0, high).astype(np.uint8)


def requantization(exact: Staircase, gain: int) -> Requantization:
    """Choose bias and multiplier for weights that are scaled up by `gain`, so that the fewest accumulators differ."""
    wanted = _steps(exact)
    multiplier = np.maximum(exact.multiplier, _LEAST_MULTIPLIER)
    ideal = np.clip(gain * exact.offset / multiplier, -LARGEST_BIAS, LARGEST_BIAS)
    channels = len(ideal)
    best = Requantization(
        gain, np.zeros(channels, np.int32), np.zeros(channels, np.float32), np.full(channels, np.iinfo(np.int64).max),
        exact.high_acc - exact.low_acc + 1,
    )  # fmt: skip
    for nudge in _BIASES:
        bias = np.clip(np.rint(ideal) + nudge, -LARGEST_BIAS, LARGEST_BIAS)
        tried = _between_steps(exact, wanted, bias, gain).astype(np.float32)
        differing = np.abs(_integer_steps(exact, gain, bias, tried) - wanted).sum(1)
        better = differing < best.differing
        best.bias[better], best.multiplier[better] = bias[better].astype(np.int32), tried[better]
        best.differing[better] = differing[better]
        if not best.differing.any():
            break
    return best


def _between_steps(exact: Staircase, wanted: Ints, bias: Floats, gain: int) -> Floats:
    """The multiplier in the middle of those that put every step where it is wanted, if there are any.

    Step k is at accumulator T if multiplier * (gain * T + bias) >= k - 1/2 > multiplier * (gain * (T - 1) + bias).
    """
    half = np.arange(1, exact.high + 1) - 0.5
    after, before = gain * wanted + bias[:, None], gain * (wanted - 1) + bias[:, None]
    with np.errstate(divide="ignore"):
        least = np.where((wanted <= exact.high_acc[:, None]) & (after > 0), half / after, 0)
        most = np.where((wanted > exact.low_acc[:, None]) & (before > 0), half / before, np.inf)
    low, high = least.max(1), most.min(1)
    plain = exact.multiplier / gain
    low, high = np.maximum(low, plain * 0.5), np.minimum(high, plain * 2)
    return (low + high) / 2


def _steps(exact: Staircase) -> Ints:
    """[channels, high]: the least reachable accumulator that gives level k or more, k from 1; high_acc + 1 if none."""
    k = np.arange(1, exact.high + 1)
    m, b = exact.multiplier[:, None], exact.offset[:, None]

    def reached(acc: Floats) -> NDArray[np.bool_]:
        return np.rint(m * acc + b) >= k

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        start = (k - 0.5 - b) / m
    return _refined(start, exact, reached)


def _integer_steps(exact: Staircase, gain: int, bias: Floats, multiplier: NDArray[np.float32]) -> Ints:
    k = np.arange(1, exact.high + 1)
    m, b = multiplier[:, None], bias[:, None]

    def reached(acc: Floats) -> NDArray[np.bool_]:
        return np.rint((gain * acc + b).astype(np.float32) * m) >= k

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        start = ((k - 0.5) / m.astype(np.float64) - b) / gain
    return _refined(start, exact, reached)


def _refined(start: Floats, exact: Staircase, reached: Any) -> Ints:
    """The exact place of each step, from a guess that is off by a few: by asking on either side of it."""
    low, high = exact.low_acc[:, None].astype(np.float64), exact.high_acc[:, None] + 1.0
    at = np.clip(np.ceil(np.nan_to_num(start, nan=np.inf)), low, high)
    while (late := (at > low) & reached(at - 1)).any():
        at -= late
    while (early := (at < high) & ~reached(at)).any():
        at += early
    return at.astype(np.int64)
