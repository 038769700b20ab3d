"""The integer graph a second time, slowly and without ONNX Runtime: what its outputs have to be, bit for bit.

Every product and sum of integers is computed in float64 matrix products, which are exact up to 2^53; an accumulator
stays below 2^31.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .requantize import levels

if TYPE_CHECKING:
    from .integer import IntegerNet


def run_reference(net: IntegerNet, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    """uint8 images [N, in_chans, size, size] to int32 accumulators [N, num_classes]."""
    x = images
    for layer in net.hidden:
        if layer.linear:
            x = x.reshape(len(x), -1, 1, 1)
        chosen = layer.requantization
        acc = _convolution(x, layer.scaled_weight)
        x = levels(acc, chosen.bias[:, None, None], chosen.multiplier[:, None, None], layer.high)
        if layer.pooled:
            x = _max_pool(x)
    return _convolution(x.reshape(len(x), -1, 1, 1), net.head[:, :, None, None])[:, :, 0, 0].astype(np.int32)


def _convolution(x: NDArray[np.uint8], weight: NDArray[np.int8]) -> NDArray[np.int64]:
    height, width = weight.shape[2:]
    windows = sliding_window_view(x, (height, width), axis=(2, 3))  # [N, in, rows, columns, height, width]
    n, _, rows, columns = windows.shape[:4]
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * rows * columns, -1).astype(np.float64)
    sums = patches @ weight.reshape(len(weight), -1).T.astype(np.float64)
    return sums.reshape(n, rows, columns, len(weight)).transpose(0, 3, 1, 2).astype(np.int64)


def _max_pool(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = [x[:, :, row:rows:2, column:columns:2] for row in (0, 1) for column in (0, 1)]
    return np.maximum.reduce(corners)
