"""Requantization: the int32 bias and the float32 multiplier of each channel that turn accumulators into levels.

A trained layer has level round(multiplier * accumulator + offset), a step function of the integer accumulator. Levels
are clipped to 0..high after an activation, and to -128..127 where they are added to the output of a block. The
integer graph has round(float32(gain * accumulator + bias) * float32 multiplier) with an integer bias, another step
function. The two are equal where their steps are at the same accumulators. So bias and multiplier are chosen to move
the fewest steps, and the accumulators with different levels are counted: none, or almost none, if the biases of the
model were quantized (`cnvzoo.quantize_bias`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnvzoo.models.integers import LARGEST_BIAS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_LEAST_MULTIPLIER = 1e-12  # avoids division by zero in channels whose level does not depend on the input
_BIAS_CHANGES = (0, -1, 1)  # tried around the rounded bias
_LARGEST_INT32 = (1 << 31) - 1


def reachable_accumulators(weight: NDArray[Any], high: int) -> tuple[Ints, Ints]:
    """The smallest and largest sums of products of integer weights [channels, n] and levels from 0 to `high`."""
    wide = weight.astype(np.int64)
    return high * np.minimum(wide, 0).sum(1), high * np.maximum(wide, 0).sum(1)


@dataclass(frozen=True)
class StepFunctions:
    """The step functions of a trained layer, one for each channel: round(multiplier * acc + offset) in low..high.

    Attributes:
        multiplier: [channels], at least 0.
        offset: [channels].
        low_acc, high_acc: [channels], smallest and largest accumulator that any input can give.
        high, low: the largest and the smallest level.
    """

    multiplier: Floats
    offset: Floats
    low_acc: Ints
    high_acc: Ints
    high: int
    low: int = 0

    @property
    def halves(self) -> Floats:
        """[high - low]: the values halfway between two levels, which are rounded to one of them."""
        return np.arange(self.low + 1, self.high + 1, dtype=np.float64) - 0.5

    def clipped(self, values: Floats) -> Floats:
        """Values as levels: rounded half to even, clipped to low..high."""
        return np.clip(np.rint(values), self.low, self.high)


@dataclass(frozen=True)
class Requantization:
    """What the integer graph computes: round(float32(gain * acc + bias) * multiplier), clipped to low..high.

    Attributes:
        gain: integer by which the weights are multiplied.
        bias: int32 [channels].
        multiplier: float32 [channels].
        low, high: the smallest and the largest level.
        differing: int64 [channels], number of reachable accumulators whose level differs from the trained layer's; one
            that is off by n levels counts n times.
        reachable: int64 [channels], number of reachable accumulators.
    """

    gain: int
    bias: NDArray[np.int32]
    multiplier: NDArray[np.float32]
    low: int
    high: int
    differing: Ints
    reachable: Ints

    def levels(self, acc: NDArray[Any]) -> NDArray[np.int16]:
        """The levels of accumulators, in the arithmetic of the integer graph.

        The sum in int32, rounded to float32 (half to even), times the multiplier in float32, rounded half to even,
        clipped to low..high.

        Args:
            acc: accumulators [..., channels] of weights that were multiplied by the gain; an integer type.
        """
        product = (acc + self.bias).astype(np.int32).astype(np.float32) * self.multiplier
        return np.clip(np.rint(product), self.low, self.high).astype(np.int16)

    def thresholds(self, low_acc: Ints, high_acc: Ints) -> Ints:
        """The smallest accumulators of weights without the gain whose level is k or more, for k from low + 1 to high.

        Args:
            low_acc, high_acc: [channels], the smallest and largest accumulators that are considered.

        Returns:
            [channels, high - low], from low_acc to high_acc + 1, which stands for no such accumulator.
        """
        nothing = np.zeros(len(self.bias))
        reachable = StepFunctions(nothing, nothing, low_acc, high_acc, self.high, self.low)
        return _integer_steps(reachable, self.gain, self.bias.astype(np.float64), self.multiplier)

    def fits_int32(self, exact: StepFunctions) -> bool:
        """Whether every reachable accumulator is an int32, also after the bias is added."""
        largest = self.gain * np.maximum(np.abs(exact.low_acc), np.abs(exact.high_acc))
        return bool((largest + np.abs(self.bias.astype(np.int64)) <= _LARGEST_INT32).all())


def requantize(exact: StepFunctions, gain: int, *, biased: bool = True) -> Requantization:
    """Choose bias and multiplier, for weights multiplied by `gain`, such that the fewest accumulators differ.

    Args:
        exact: what the trained layer computes.
        gain: integer by which the weights are multiplied.
        biased: whether the integer graph can add a bias; else it is 0.
    """
    wanted = _exact_steps(exact)
    multiplier = np.maximum(exact.multiplier, _LEAST_MULTIPLIER)
    ideal = np.clip(gain * exact.offset / multiplier, -LARGEST_BIAS, LARGEST_BIAS)
    channels = len(ideal)
    best = Requantization(
        gain, np.zeros(channels, np.int32), np.zeros(channels, np.float32), exact.low, exact.high,
        np.full(channels, np.iinfo(np.int64).max), exact.high_acc - exact.low_acc + 1,
    )  # fmt: skip
    for change in _BIAS_CHANGES if biased else (0,):
        bias = np.clip(np.rint(ideal) + change, -LARGEST_BIAS, LARGEST_BIAS)
        tried = _multiplier_for(exact, wanted, bias, gain).astype(np.float32)
        differing = np.abs(_integer_steps(exact, gain, bias, tried) - wanted).sum(1)
        better = differing < best.differing
        best.bias[better], best.multiplier[better] = bias[better].astype(np.int32), tried[better]
        best.differing[better] = differing[better]
        if not best.differing.any():
            break
    return best


def _multiplier_for(exact: StepFunctions, wanted: Ints, bias: Floats, gain: int) -> Floats:
    """The middle of the interval of multipliers that put every step at its wanted accumulator, if there is one.

    Step k is at accumulator T if multiplier * (gain * T + bias) >= k - 1/2 > multiplier * (gain * (T - 1) + bias). The
    steps to levels below 1 are at negative values of both sides, so that dividing by these turns the inequalities.
    """
    half = exact.halves
    after, before = gain * wanted + bias[:, None], gain * (wanted - 1) + bias[:, None]
    is_reached, is_passed = wanted <= exact.high_acc[:, None], wanted > exact.low_acc[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        at_after, at_before = half / after, half / before
    least = np.where((half > 0) & is_reached & (after > 0), at_after, 0)
    least = np.where((half < 0) & is_passed & (before < 0), at_before, least)
    most = np.where((half > 0) & is_passed & (before > 0), at_before, np.inf)
    most = np.where((half < 0) & is_reached & (after < 0), at_after, most)
    low, high = least.max(1), most.min(1)
    # where the bias had to be limited, the offset needs a larger multiplier; such a level hardly depends on the input
    limited = np.where(np.abs(bias) < LARGEST_BIAS, 0, np.abs(exact.offset) / LARGEST_BIAS)
    plain = np.maximum(exact.multiplier / gain, limited)
    low, high = np.maximum(low, plain * 0.5), np.minimum(high, plain * 2)
    return (low + high) / 2


def _exact_steps(exact: StepFunctions) -> Ints:
    """The smallest reachable accumulators with level k or more; high_acc + 1 if there is none.

    [channels, high - low], k from low + 1.
    """
    k = exact.halves + 0.5
    m, b = exact.multiplier[:, None], exact.offset[:, None]

    def reached(acc: Floats) -> NDArray[np.bool_]:
        return np.rint(m * acc + b) >= k

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        start = (exact.halves - b) / m
    return _search(start, exact, reached)


def _integer_steps(exact: StepFunctions, gain: int, bias: Floats, multiplier: NDArray[np.float32]) -> Ints:
    """As `_exact_steps`, for the step functions of the integer graph."""
    k = exact.halves + 0.5
    m, b = multiplier[:, None], bias[:, None]

    def reached(acc: Floats) -> NDArray[np.bool_]:
        return np.rint((gain * acc + b).astype(np.float32) * m) >= k

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        start = (exact.halves / m.astype(np.float64) - b) / gain
    return _search(start, exact, reached)


def _search(start: Floats, exact: StepFunctions, reached: Callable[[Floats], NDArray[np.bool_]]) -> Ints:
    """The smallest accumulators for which `reached`, which never falls, holds; high_acc + 1 if there is none.

    The search goes from `start` in steps of growing size, then bisects: `start` is off by a few, except in channels
    whose level does not depend on the input, where it may be at the wrong end.
    """
    low, high = exact.low_acc[:, None].astype(np.float64), exact.high_acc[:, None] + 1.0
    at = np.clip(np.ceil(np.nan_to_num(start, nan=np.inf)), low, high)
    least, most, step = np.broadcast_to(low, at.shape), np.broadcast_to(high, at.shape), 1.0
    while (least < most).any():
        below = reached(at)
        least, most = np.where(below, least, np.maximum(least, at + 1)), np.where(below, np.minimum(most, at), most)
        middle = np.floor((least + most) / 2)
        at = np.where(below, np.maximum(middle, most - step), np.minimum(middle, least + step - 1))
        step *= 2
    return most.astype(np.int64)
