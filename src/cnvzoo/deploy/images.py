"""From images to what a graph takes, in numpy, with the very bits of `cnvzoo.transforms`.

torchvision resizes 8-bit images with 16-bit integer weights, first along rows and then along columns, each pass
rounded to 8 bits (PyTorch, aten/src/ATen/native/cpu/UpSampleKernel.cpp, after Pillow); the same is done here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnvzoo.deploy.metadata import DeployError

Pixels = NDArray[np.uint8]
_GREY = (0.2989, 0.587, 0.114)


def prepare(image: Any, in_chans: int, side: int, size: int) -> Pixels:
    """One image, a PIL image or uint8 [H, W] or [H, W, C], to uint8 [in_chans, size, size].

    Grey and colour are converted to `in_chans`; the shorter side is resized to `side`, the middle cut out, and padded
    with black to `size`.

    Raises:
        DeployError: not an image of 8 bits, or not of 1 or 3 channels.
    """
    pixels = _channels(_eight_bit(image), in_chans)
    pixels = _middle(_resize(pixels, side), side)
    margin = (size - side) // 2
    return np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)))


def _eight_bit(image: Any) -> Pixels:
    """uint8 [C, H, W]."""
    if hasattr(image, "getbands"):  # a PIL image, without importing PIL
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            raise DeployError(f"expected an 8-bit image, got one of PIL mode {image.mode!r}: scale it to 8 bits")
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise DeployError(f"expected a PIL image or a uint8 array [H, W, C], got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise DeployError(f"an image has to be uint8 (0 to 255), got {image.dtype}")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise DeployError(f"an image has to be [H, W] or [H, W, C] with C 1 or 3, got shape {list(image.shape)}")
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _channels(pixels: Pixels, in_chans: int) -> Pixels:
    if len(pixels) == in_chans:
        return pixels
    if in_chans == 3:
        return np.repeat(pixels, 3, axis=0)
    # torch adds a multiple in one rounding; in float64 the product is exact
    total = np.zeros(pixels.shape[1:], np.float32)
    for weight, plane in zip(_GREY, pixels, strict=True):
        total = (total + np.float64(np.float32(weight)) * plane).astype(np.float32)
    return total.astype(np.uint8)[None]


def _resize(pixels: Pixels, side: int) -> Pixels:
    """The shorter side becomes `side`; bilinear, antialiased."""
    height, width = pixels.shape[1:]
    if min(height, width) == side:
        return pixels
    new = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    if new[1] != width:
        pixels = _resize_last(pixels, new[1])
    if new[0] != height:
        pixels = _resize_last(pixels.swapaxes(1, 2), new[0]).swapaxes(1, 2)
    return pixels


def _resize_last(pixels: Pixels, size: int) -> Pixels:
    """Resize the last axis: a triangle filter in integers."""
    length = pixels.shape[-1]
    scale = length / size
    support = max(scale, 1.0)
    matrix = np.zeros((size, length))
    for row in range(size):
        center = scale * (row + 0.5)
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), length)
        distance = np.abs((np.arange(first, last) - center + 0.5) / support)
        weights = np.maximum(1 - distance, 0)
        matrix[row, first:last] = weights / weights.sum()
    precision = 0
    while precision < 22 and int(0.5 + matrix.max() * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    integers = np.floor(0.5 + matrix * (1 << precision)).astype(np.int64)
    sums = pixels.astype(np.int64) @ integers.T + (1 << (precision - 1))
    return np.clip(sums >> precision, 0, 255).astype(np.uint8)


def _middle(pixels: Pixels, side: int) -> Pixels:
    top, left = (round((length - side) / 2) for length in pixels.shape[1:])
    return pixels[:, top : top + side, left : left + side]


def normalised(pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """uint8 [N, C, H, W] to float32: times float32(1/255), minus mean, over std."""
    center, spread = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    return (pixels.astype(np.float32) * np.float32(1 / 255) - center) / spread
