"""Requantization without floating point, equal to the integer graph's for every accumulator that an input can give.

In the integer graph, the level is a step function of the accumulator: level k begins at accumulator T_k. Another
step function is

    (accumulator * multiplier + offset) >> shift, clipped to 0..most

whose levels begin at ceil((k * 2^shift - offset) / multiplier). The two are equal where these are the same. For a given
multiplier and shift, T_k requires an offset of at least k * 2^shift - T_k * multiplier, and below k * 2^shift -
(T_k - 1) * multiplier; any offset in the intersection over all k gives the same step function.

Products in float32 are rounded, which moves a level of 8 bits by one accumulator if it begins very close to a rounding
boundary. Then there is no such offset, and the levels at other accumulators are listed: the changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnvzoo.deploy.requantize import Requantization

Ints = NDArray[np.int64]
THRESHOLDS_ONLY = 3  # levels above the smallest, up to which thresholds are no more bytes than a multiplier
_MULTIPLIER_BITS = 30
_MOST_SHIFT = 52  # 256 << 52 is an int64, and so is the sum
_LEAST_SLOPE = 1e-30  # below it, no accumulator changes the level
_INFINITE = np.int64(1) << 61
_LARGEST_INT32 = (1 << 31) - 1


@dataclass(frozen=True)
class FixedPoint:
    """Levels above the smallest one, of accumulators before the multiplication by the gain.

    Attributes:
        thresholds: int64 [channels, most], the accumulators at which the levels 1 to `most` begin.
        multiplier: int64 [channels], 0 to 2^31 - 1.
        offset: int64 [channels].
        shift: int64 [channels], 1 to 52.
        changes: int64 [changes, 3]: the channel, the accumulator at which one of its levels begins, and the one at
            which it would begin without the change; in the order of the channels.
    """

    thresholds: Ints
    multiplier: Ints
    offset: Ints
    shift: Ints
    changes: Ints

    @property
    def most(self) -> int:
        return self.thresholds.shape[1]

    @property
    def has_multipliers(self) -> bool:
        """Whether multipliers are used: not for few levels, whose thresholds take no more bytes."""
        return self.most > THRESHOLDS_ONLY


def fixed_point(chosen: Requantization, low_acc: Ints, high_acc: Ints) -> FixedPoint:
    """Multiplier, offset and shift of each channel, and the changes that make every level begin where it should.

    Args:
        chosen: the requantization of the integer graph.
        low_acc, high_acc: [channels], the smallest and largest accumulators of weights without the gain.
    """
    wanted = chosen.thresholds(low_acc, high_acc)
    # a larger slope would not fit the int32 of the multiplier; `changes` corrects what the limit moves
    slope = np.clip(chosen.multiplier.astype(np.float64), _LEAST_SLOPE, 2.0 ** (_MULTIPLIER_BITS - 1) / chosen.gain)
    shift = np.clip(_MULTIPLIER_BITS - 1 - np.floor(np.log2(slope * chosen.gain)), 1, _MOST_SHIFT).astype(np.int64)
    multiplier = np.rint(np.ldexp(slope * chosen.gain, shift)).astype(np.int64)
    least, most = _offsets(wanted, low_acc, high_acc, shift, multiplier)
    plain = np.rint(np.ldexp(chosen.bias * slope + 0.5 - chosen.low, shift))
    offset = np.clip(plain, -float(_INFINITE), float(_INFINITE)).astype(np.int64)
    offset = np.where(least <= most, least + (most - least) // 2, offset)
    # channels with one level for all accumulators, whatever their weights
    always = (wanted <= low_acc[:, None]).sum(1)
    same = always == (wanted <= high_acc[:, None]).sum(1)
    multiplier[same], shift[same], offset[same] = 0, 1, 2 * always[same] + 1
    ends = np.where(np.arange(wanted.shape[1]) < always[:, None], -_LARGEST_INT32 - 1, _LARGEST_INT32)
    thresholds = np.where(same[:, None], ends, np.minimum(wanted, _LARGEST_INT32))
    found = _steps(multiplier, offset, shift, low_acc, high_acc, wanted.shape[1])
    channel, level = np.nonzero((found != wanted) & ~same[:, None])
    changes = np.stack([channel, wanted[channel, level], found[channel, level]], 1)
    return FixedPoint(thresholds, multiplier, offset, shift, changes)


def _offsets(steps: Ints, low_acc: Ints, high_acc: Ints, shift: Ints, multiplier: Ints) -> tuple[Ints, Ints]:
    """The smallest and the largest offsets that put every step at its accumulator; no offset if least > most."""
    levels = np.arange(1, steps.shape[1] + 1, dtype=np.int64) << shift[:, None]
    reached, passed = steps <= high_acc[:, None], steps > low_acc[:, None]
    least = np.where(reached, levels - steps * multiplier[:, None], -_INFINITE).max(1)
    most = np.where(passed, levels - (steps - 1) * multiplier[:, None], _INFINITE).min(1) - 1
    return least, most


def _steps(multiplier: Ints, offset: Ints, shift: Ints, low_acc: Ints, high_acc: Ints, most: int) -> Ints:
    """The accumulators at which the levels 1 to `most` begin, limited to low_acc..high_acc + 1: exact integers."""
    above = (np.arange(1, most + 1, dtype=np.int64) << shift[:, None]) - offset[:, None]
    at = -(-above // np.maximum(multiplier, 1)[:, None])
    return np.clip(at, low_acc[:, None], high_acc[:, None] + 1)
