"""Where the levels of a net are in the memory of its C code: shapes, rows that are kept, and places in one array.

Levels are uint8 [rows, columns, channels]. Those of two nodes share bytes if the last use of one is before the other is
computed. A layer right after the image, with a single use, often has the largest output, as in a CNV; it is computed a
few rows at a time, and only the rows that the next layer needs at a time are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnvzoo.deploy.integer import Head, Image, IntegerNet, Layer, Node, Rounding, Sum

Shape = tuple[int, int, int]  # rows, columns, channels


@dataclass(frozen=True)
class Place:
    """The levels of a node in memory.

    Attributes:
        shape: rows, columns and channels.
        kept: the rows that are in memory at a time; row y is at y % kept.
        start: position of the first byte in the array; None for a grey image, which is read where the caller has it.
        below: what is added to the levels when they are stored: 128 for summands, else 0.
        high: the largest stored level.
    """

    shape: Shape
    kept: int
    start: int | None
    below: int
    high: int

    @property
    def size(self) -> int:
        """Bytes."""
        return 0 if self.start is None else self.kept * math.prod(self.shape[1:])

    @property
    def end(self) -> int:
        return (self.start or 0) + self.size


@dataclass(frozen=True)
class Memory:
    """The places of all nodes but the head, in the order of `IntegerNet.nodes`.

    Attributes:
        strip: rows of the output of the second node, as stored, for which the first computes its rows at a time; None
            if the first is computed at once.
    """

    places: tuple[Place, ...]
    strip: int | None

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return max(place.end for place in self.places)


def plan_memory(net: IntegerNet) -> Memory:
    """The smallest array that first-fit finds; with the most rows at a time that fit into it."""
    shapes = node_shapes(net)
    plans = [_placed(net, shapes, None)]
    first, second, *others = (*net.nodes[1:], net.head)  # twice in a net of nothing else
    is_pair = isinstance(first, Layer) and isinstance(second, Layer) and second.inputs == (1,)
    if is_pair and not any(1 in node.inputs for node in others):
        plans += [_placed(net, shapes, strip) for strip in range(shapes[2][0] - 1, 0, -1)]
    return min(plans, key=lambda plan: plan.size)


def rows_needed(layer: Layer, in_rows: int, last: int) -> int:
    """How many rows of its input a layer needs for the rows before `last` of its output, as stored."""
    rows = last * (2 if layer.pooled else 1)
    return min(in_rows, (rows - 1) * layer.stride[0] - layer.padding[0] + layer.weight.shape[2])


def node_shapes(net: IntegerNet) -> list[Shape]:
    """The shape of the levels of each node but the head."""
    shapes: list[Shape] = []
    for node in net.nodes[:-1]:
        if isinstance(node, Image):
            shapes.append((node.size, node.size, node.channels))
        elif isinstance(node, Layer):
            shapes.append(_layer_shape(node, shapes[node.inputs[0]]))
        else:
            shapes.append(shapes[node.inputs[0]])
    return shapes


def _layer_shape(layer: Layer, taken: Shape) -> Shape:
    rows, columns = layer.output_sides(*taken[:2])
    return (rows // 2, columns // 2, len(layer.weight)) if layer.pooled else (rows, columns, len(layer.weight))


def _kept(net: IntegerNet, shapes: Sequence[Shape], strip: int) -> int:
    """The most rows of the first layer that a strip of the second needs, and that are computed before it."""
    second, rows = net.nodes[2], shapes[1][0]
    assert isinstance(second, Layer)
    pool, most = 2 if second.pooled else 1, 1
    for start in range(0, shapes[2][0], strip):
        first = max(0, start * pool * second.stride[0] - second.padding[0])
        end = rows_needed(second, rows, min(start + strip, shapes[2][0]))
        most = max(most, end - min(first, rows))
    return most


def _placed(net: IntegerNet, shapes: Sequence[Shape], strip: int | None) -> Memory:
    last_use = {taken: position for position, node in enumerate(net.nodes) for taken in node.inputs}
    if strip is not None:
        last_use[0] = max(last_use[0], 2)  # the image and the first layer are needed until the second is computed
    places: list[Place] = []
    for position, (node, shape) in enumerate(zip(net.nodes[:-1], shapes, strict=True)):
        kept = shape[0] if strip is None or position != 1 else _kept(net, shapes, strip)
        below, high = _range(node)
        if isinstance(node, Image) and node.channels == 1:
            places.append(Place(shape, kept, None, below, high))
            continue
        # while the second layer is computed in strips, its output is in memory together with that of the first
        since = 1 if strip is not None and position == 2 else position
        used = [place for i, place in enumerate(places) if last_use.get(i, i) >= since and place.start is not None]
        start = _first_fit(used, kept * math.prod(shape[1:]))
        if isinstance(node, (Sum, Rounding)) and last_use[node.inputs[0]] == position:
            taken = places[node.inputs[0]]
            start = start if taken.start is None else taken.start  # byte by byte, in the place of its input
        places.append(Place(shape, kept, start, below, high))
    return Memory(tuple(places), strip)


def _range(node: Node) -> tuple[int, int]:
    """What is added to the levels of a node when they are stored, and the largest stored level."""
    assert not isinstance(node, Head)
    if isinstance(node, (Layer, Rounding)):
        return -node.requantization.low, node.requantization.high - node.requantization.low
    return 0, 255


def _first_fit(used: Sequence[Place], size: int) -> int:
    """The first position at which `size` bytes are free."""
    start = 0
    for place in sorted(used, key=lambda place: place.start or 0):
        assert place.start is not None
        if place.start - start >= size:
            break
        start = max(start, place.end)
    return start
