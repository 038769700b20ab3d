"""A reference implementation of integer nets in numpy: slow, and without any code of ONNX Runtime, which it checks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from cnvzoo.deploy.integer import Head, IntegerNet, Layer, Node, Rounding, Sum

Integers = NDArray[Any]
_IMAGES = 50  # run at a time
_EXACT_FLOAT32 = 1 << 24  # all integers up to it are float32 numbers
_LARGEST_LEVEL = 255


def run_reference(net: IntegerNet, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Run the network: uint8 images [N, in_chans, size, size] to int32 accumulators [N, classes]."""
    parts = [_run(net, images[start : start + _IMAGES]) for start in range(0, len(images), _IMAGES)]
    return np.concatenate([np.empty((0, len(net.head.weight)), np.int32), *parts])


def _run(net: IntegerNet, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    last_use = {taken: position for position, node in enumerate(net.nodes) for taken in node.inputs}
    outputs: list[Integers | None] = [images]
    for position, node in enumerate(net.nodes[1:], start=1):
        taken = [outputs[i] for i in node.inputs]
        outputs.append(apply(node, *(x for x in taken if x is not None)))
        for i in node.inputs:
            if last_use[i] == position:
                outputs[i] = None  # frees the memory
    assert outputs[-1] is not None
    return outputs[-1].astype(np.int32)


def apply(node: Node, *inputs: Integers) -> Integers:
    """The output of one node: integers [N, channels, rows, columns], or [N, classes] of the head.

    Args:
        node: any but the image.
        inputs: the outputs of the nodes that it takes, in an integer type.
    """
    x, *others = inputs
    if isinstance(node, Sum):
        return np.clip(x.astype(np.int16) + others[0].astype(np.int16), 0, _LARGEST_LEVEL)
    if isinstance(node, Rounding):
        return node.requantization.levels(x[..., None])[..., 0]
    if isinstance(node, Layer):
        acc = _convolution(x, node.scaled_weight, node.stride, node.padding, node.groups)
        found = node.requantization.levels(acc).transpose(0, 3, 1, 2)
        return _max_pool(found) if node.pooled else found
    assert isinstance(node, Head)
    features = x.sum((2, 3), dtype=np.int64) if node.pixels else x.reshape(len(x), -1).astype(np.int64)
    acc = features @ node.scaled_weight.astype(np.int64).T
    return acc if node.bias is None else acc + node.bias


def _convolution(
    x: Integers, weight: NDArray[np.int8], stride: tuple[int, int], padding: tuple[int, int], groups: int
) -> NDArray[np.int64]:
    """The accumulators of a convolution, [N, rows, columns, out]."""
    n, channels, (height, width) = len(x), x.shape[1], weight.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
    windows = sliding_window_view(x, (height, width), axis=(2, 3))[:, :, :: stride[0], :: stride[1]]
    rows, columns = windows.shape[2:4]
    windows = windows.reshape(n, groups, channels // groups, rows, columns, height, width)
    rows_of_weights = weight.reshape(groups, len(weight) // groups, -1)
    largest = _LARGEST_LEVEL * np.abs(rows_of_weights.astype(np.int64)).sum(2).max()
    exact = np.float32 if largest <= _EXACT_FLOAT32 else np.float64  # for every partial sum
    patches = windows.transpose(1, 0, 3, 4, 2, 5, 6).reshape(groups, n * rows * columns, -1).astype(exact)
    sums = patches @ rows_of_weights.transpose(0, 2, 1).astype(exact)  # [groups, N * rows * columns, out / groups]
    return sums.transpose(1, 0, 2).reshape(n, rows, columns, len(weight)).astype(np.int64)


def _max_pool(x: Integers) -> Integers:
    rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = [x[:, :, row:rows:2, column:columns:2] for row in (0, 1) for column in (0, 1)]
    return np.maximum.reduce(corners)
