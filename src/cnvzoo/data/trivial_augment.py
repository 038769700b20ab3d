"""TrivialAugmentWide (Mueller & Hutter 2021, arXiv:2103.10158) on a uint8 batch, an operation of its own per image.

Operations, magnitudes and arithmetic are torchvision's (`transforms.v2.TrivialAugmentWide`, nearest interpolation,
black fill). The operations of a batch are drawn on the host and sorted, so that each kernel gets one contiguous slice
of the batch and runs once: nothing is computed for images that another operation takes, and the device never reports
back. Sorting changes nothing in distribution, because the images of a batch are themselves in random order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
BINS = 31
_Kernel = Callable[[Tensor, Tensor], Tensor]
_ID = {name: i for i, name in enumerate(OPERATIONS)}
_SIGNED = torch.tensor([_ID["ShearX"] <= i <= _ID["Sharpness"] for i in range(len(OPERATIONS))])


def magnitude_table() -> Tensor:
    """float64 [operation, bin]: shear, pixels, degrees, change of factor, bits, share of 255; 0 where there is none."""
    table = torch.zeros(len(OPERATIONS), BINS, dtype=torch.float64)
    for name, largest in {"Shear": 0.99, "Translate": 32.0, "Rotate": 135.0}.items():
        for i, operation in enumerate(OPERATIONS):
            if operation.startswith(name):
                table[i] = torch.linspace(0.0, largest, BINS)
    table[_ID["Brightness"] : _ID["Sharpness"] + 1] = torch.linspace(0.0, 0.99, BINS)
    table[_ID["Posterize"]] = (8 - torch.arange(BINS) / ((BINS - 1) / 6)).round()
    table[_ID["Solarize"]] = torch.linspace(1.0, 0.0, BINS)
    return table


def draw(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An operation (int64, sorted within each batch) and its signed magnitude (float64) for [steps, B] images."""
    operation = torch.randint(len(OPERATIONS), shape, generator=generator).sort(dim=1).values
    bins = torch.randint(BINS, shape, generator=generator)
    negative = (torch.rand(shape, generator=generator) < 0.5) & _SIGNED[operation]
    magnitude = magnitude_table()[operation, bins]
    return operation, torch.where(negative, -magnitude, magnitude)


def counts(operation: Tensor) -> list[list[int]]:
    """How many images of each batch an operation takes: [steps][operation], on the host."""
    return torch.nn.functional.one_hot(operation, len(OPERATIONS)).sum(1).tolist()


def parameters(operation: Tensor, magnitude: Tensor, size: int) -> Tensor:
    """The numbers that the kernels read, float32 [..., 6].

    For a geometric operation the map from output to source pixels about the image centre, as rows (xx, xy, x0) and
    (yx, yy, y0); for the others one number, in column 0: the change of factor, the bit mask, or the threshold.
    """
    p = torch.zeros(*operation.shape, 6, dtype=torch.float64)
    p[..., 0] = magnitude

    def where(name: str) -> tuple[Tensor, Tensor]:
        chosen = operation == _ID[name]
        return chosen, magnitude[chosen]

    # torchvision shears about the corner of the image, and rotates counter-clockwise about its centre.
    for name, slope, offset in (("ShearX", 1, 2), ("ShearY", 3, 5)):
        chosen, m = where(name)
        p[chosen] = _affine(len(m), {slope: m, offset: m * (size / 2)})
    for name, offset in (("TranslateX", 2), ("TranslateY", 5)):
        chosen, m = where(name)
        p[chosen] = _affine(len(m), {offset: -m.trunc()})
    chosen, m = where("Rotate")
    cos, sin = torch.cos(m * (math.pi / 180)), torch.sin(m * (math.pi / 180))
    p[chosen] = _affine(len(m), {0: cos, 1: -sin, 3: sin, 4: cos})
    chosen, m = where("Posterize")
    p[..., 0][chosen] = 256 - torch.exp2(8 - m)
    chosen, m = where("Solarize")
    p[..., 0][chosen] = 255 * m
    return p.to(torch.float32)


def _affine(n: int, values: dict[int, Tensor]) -> Tensor:
    p = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(n, 1)
    for column, value in values.items():
        p[:, column] = value
    return p


def apply_(images: Tensor, parameters: Tensor, counts: list[int]) -> Tensor:
    """Augment a batch in place.

    Args:
        images: contiguous uint8 [B, S, S, C], C 1 or 3.
        parameters: float32 [B, 6] of `parameters`, sorted by operation.
        counts: how many images each operation takes, in the order of `OPERATIONS`; they sum to B.
    """
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)

    def run(first: str, last: str, kernel: _Kernel) -> None:
        a, b = ends[_ID[first]], ends[_ID[last] + 1]
        if b > a:
            images[a:b] = kernel(images[a:b], parameters[a:b])

    run("ShearX", "Rotate", _warp)
    run("Brightness", "Brightness", _brightness)
    if images.shape[3] == 3:
        run("Color", "Color", _color)
    run("Contrast", "Contrast", _contrast)
    run("Sharpness", "Sharpness", _sharpness)
    run("Posterize", "Posterize", _posterize)
    run("Solarize", "Solarize", _solarize)
    run("AutoContrast", "AutoContrast", _autocontrast)
    run("Equalize", "Equalize", _equalize)
    return images


def _warp(images: Tensor, p: Tensor) -> Tensor:
    n, s, _, c = images.shape
    pixel = torch.arange(s, dtype=torch.float32, device=images.device)
    x = (pixel - (s - 1) / 2)[None, None, :]
    y = (pixel - (s - 1) / 2)[None, :, None]
    xx, xy, x0, yx, yy, y0 = p[:, :, None, None].unbind(1)
    col = (xx * x + xy * y + (x0 + (s - 1) / 2)).round_()
    row = (yx * x + yy * y + (y0 + (s - 1) / 2)).round_()
    inside = (col >= 0) & (col < s) & (row >= 0) & (row < s)
    first = torch.arange(0, n * s * s, s * s, device=images.device)[:, None, None]
    # What comes from outside the image is read from one black pixel after the last.
    index = torch.where(inside, (row * s + col).long() + first, n * s * s)
    pixels = torch.cat([images.reshape(-1, c), images.new_zeros(1, c)])
    return pixels.index_select(0, index.view(-1)).view(n, s, s, c)


def _to_uint8(x: Tensor) -> Tensor:
    # Like torchvision, fractions are dropped, not rounded.
    return x.clamp_(0, 255).to(torch.uint8)


def _minus_scaled(x: Tensor, other: Tensor, p: Tensor) -> Tensor:
    """x - other * m for float32 operands, rounded once, as by the fused multiply-add in torchvision's blend.

    Which side of a whole number a result falls on decides a grey level, so the rounding is fixed through float64
    instead of left to what a device fuses.
    """
    return _to_uint8((x.double() - other.double() * p[:, 0, None, None, None].double()).float())


def _blend(x: Tensor, other: Tensor, p: Tensor) -> Tensor:
    """x * (1 + m) - other * m: away from `other` for m > 0, towards it for m < 0."""
    return _minus_scaled(x * (1 + p[:, 0, None, None, None]), other, p)


def _grey(x: Tensor) -> Tensor:
    """Luma of float32 [B, S, S, C], whole numbers as in Pillow, [B, S, S, 1]."""
    if x.shape[3] == 1:
        return x
    r, g, b = x.split(1, dim=3)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).floor_()


def _brightness(images: Tensor, p: Tensor) -> Tensor:
    return _to_uint8(images.float() * (1 + p[:, 0, None, None, None]))


def _color(images: Tensor, p: Tensor) -> Tensor:
    x = images.float()
    return _blend(x, _grey(x), p)


def _contrast(images: Tensor, p: Tensor) -> Tensor:
    x = images.float()
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), p)


def _sharpness(images: Tensor, p: Tensor) -> Tensor:
    """Away from (or towards) a 3x3 smoothing with weight 5 in the middle, 1 around; the border stays."""
    x = images.float()
    inner = x[:, 1:-1, 1:-1]
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    smooth = (total / 13).round_()  # whole sums over 13: never half-way, so rounding is exact
    out = images.clone()
    out[:, 1:-1, 1:-1] = _minus_scaled(inner, smooth - inner, p)
    return out


def _posterize(images: Tensor, p: Tensor) -> Tensor:
    return images & p[:, 0, None, None, None].to(torch.uint8)


def _solarize(images: Tensor, p: Tensor) -> Tensor:
    return torch.where(images >= p[:, 0, None, None, None], 255 - images, images)


def _autocontrast(images: Tensor, p: Tensor) -> Tensor:
    x = images.float()
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255.0))
    return _to_uint8((x - torch.where(flat, 0.0, low)).div_(scale))


def _equalize(images: Tensor, p: Tensor) -> Tensor:
    n, s, _, c = images.shape
    planes = images.permute(0, 3, 1, 2).reshape(n * c, s * s).long()
    bins = (planes + torch.arange(0, n * c * 256, 256, device=images.device)[:, None]).reshape(-1)
    histogram = torch.zeros(n * c * 256, dtype=torch.int32, device=images.device)
    histogram = histogram.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.int32)).view(n * c, 256)
    below = histogram.cumsum(1, dtype=torch.int32)
    # Pillow's scheme: the step leaves out the pixels of the brightest level present.
    brightest = planes.amax(dim=1, keepdim=True)
    step = (s * s - histogram.gather(1, brightest)).div_(255, rounding_mode="floor")
    table = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    table = torch.cat([torch.zeros_like(table[:, :1]), table[:, :-1]], dim=1)
    level = torch.where(step > 0, table.gather(1, planes), planes.int())
    return level.to(torch.uint8).view(n, c, s, s).permute(0, 2, 3, 1)
