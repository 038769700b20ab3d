"""Where names go beside their points so that none covers another: every one tries the places around its point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

XY = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

# best first; of names that are not in each other's way, all are above their points
_SIDES = (
    (0, 1),
    (0, -1),
    (1, 0),
    (-1, 0),
    (0.5, 1),
    (-0.5, 1),
    (0.5, -1),
    (-0.5, -1),
    (1, 1),
    (-1, 1),
    (1, -1),
    (-1, -1),
)
_GAPS = (0.0, 8.0, 16.0, 26.0)
_PASSES = 20
# what is worse than what, for each square point that is covered; and for each place down the list
_OF_A_NAME, _OF_A_LEADER, _OF_A_MARKER, _OF_THE_OUTSIDE, _OF_A_LINE, _OF_RANK = 4.0, 4.0, 6.0, 10.0, 0.5, 1.0


def place(points: Sequence[XY], sizes: Sequence[XY], inside: Box, radius: float, lines: Sequence[Box] = ()) -> list[XY]:
    """The centre of every name's box.

    Args:
        points: where the markers are, of `radius`.
        sizes: width and height of each name's box.
        inside: what the boxes are to stay in.
        lines: boxes that names had better not cover.
    """
    markers = [_box(point, (2 * radius, 2 * radius)) for point in points]
    candidates = [list(_around(point, size, radius)) for point, size in zip(points, sizes, strict=True)]
    chosen: dict[int, Box] = {}
    leaders: dict[int, list[Box]] = {}
    centres = list(points)

    def cost(centre: XY, rank: int, own: int) -> float:
        box = _box(centre, sizes[own])
        names = [other for number, other in chosen.items() if number != own]
        others = [dot for number, leader in leaders.items() if number != own for dot in leader]
        leader = dots((points[own], centre))
        return (
            _OF_A_NAME * _covered(box, names)
            + _OF_A_LEADER * (_covered(box, others) + sum(_covered(dot, names) for dot in leader))
            + _OF_A_MARKER * _covered(box, markers)
            + _OF_A_LINE * _covered(box, lines)
            + _OF_THE_OUTSIDE * (_area(box) - _covered(box, [inside]))
            + _OF_RANK * rank
        )

    for _ in range(_PASSES):
        before = dict(chosen)
        for number, around in enumerate(candidates):
            best = min(range(len(around)), key=lambda rank: (cost(around[rank], rank, number), rank))
            centres[number] = around[best]
            chosen[number] = _box(around[best], sizes[number])
            leaders[number] = list(dots((points[number], around[best])))
        if chosen == before:
            break
    return centres


def dots(line: Sequence[XY], *, every: float = 3.0) -> Iterable[Box]:
    """Small boxes along a line, in the place of it."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        count = int(math.hypot(x1 - x0, y1 - y0) / every) + 1
        for part in range(1, count):
            yield _box((x0 + (x1 - x0) * part / count, y0 + (y1 - y0) * part / count), (every, every))


def _around(point: XY, size: XY, radius: float) -> Iterable[XY]:
    """Centres of a name's box beside its point, then further out."""
    for gap in _GAPS:
        for x, y in _SIDES:
            reach = radius + gap
            yield point[0] + x * (reach + size[0] / 2), point[1] + y * (reach + size[1] / 2)


def _box(centre: XY, size: XY) -> Box:
    (x, y), (width, height) = centre, size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _covered(box: Box, others: Iterable[Box]) -> float:
    """How much of `box` lies over others."""
    return sum(
        _area((max(box[0], o[0]), max(box[1], o[1]), min(box[2], o[2]), min(box[3], o[3])))
        for o in others
        if box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3]
    )
