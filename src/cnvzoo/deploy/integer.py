"""The integer graph of a quantized model: its layers as integers, in the order in which they run.

A layer of the trained model has integer weights w with scale s_w, an input of integer levels x with scale s_x, a
BatchNorm y -> g * y + h with g = gamma / sigma, and an activation quantizer with scale s_a. It computes

    level = clip(round((g * s_w * s_x * sum(w * x) + h) / s_a), 0, 2^a_bits - 1)

which is clip(round(multiplier * accumulator + offset)) of the integer accumulator sum(w * x). The weights are those
that were trained. In channels with negative gamma, weights and multiplier change sign: all multipliers are positive,
so max pooling and requantization can be swapped.

In the integer graph the bias is an int32, added to the accumulator. Weights of few bits are multiplied by an integer,
the gain, as large as int8 allows, which makes the unit of the bias that much finer. A model whose biases were quantized
(`cnvzoo.quantize_bias`) has biases that are multiples of that unit, so that nothing is rounded.

What a residual block computes is clipped to -128..127 and added to levels of the same scale; the sum is clipped to
0..255. An average over all pixels is a sum of integers, and the number of pixels is part of the scale of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnvzoo.deploy.requantize import Requantization


@dataclass(frozen=True)
class Node:
    """One operation of an integer net.

    Attributes:
        name: name in the net; that of a layer is its name in the model, such as `features.0`.
        inputs: positions in `IntegerNet.nodes` of the nodes whose outputs it takes.
    """

    name: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Image(Node):
    """The image: uint8 [N, channels, size, size]."""

    channels: int
    size: int


@dataclass(frozen=True)
class Layer(Node):
    """A convolution or linear layer with BatchNorm, and an activation quantizer or a summand's rounding.

    Attributes:
        weight: int8 [out, in / groups, height, width], before multiplication by the gain; linear layers are 1x1. The
            range is -(2^(w_bits-1) - 1) to 2^(w_bits-1) - 1, and -1 or 1 for 1 bit; 0 in channels that have the same
            level for every input.
        w_bits: bit width of the weights.
        requantization: from accumulators to levels, of one value for each channel.
        stride, padding: of the rows and of the columns; padded with zeros on both sides.
        groups: of the channels, as in `torch.nn.Conv2d`.
        pooled: whether a 2x2 max pooling with stride 2 follows.
        linear: whether it is a linear layer of inputs [N, in, 1, 1].
    """

    weight: NDArray[np.int8]
    w_bits: int
    requantization: Requantization
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    pooled: bool = False
    linear: bool = False

    @property
    def scaled_weight(self) -> NDArray[np.int8]:
        """The weights times the gain, in their shape."""
        return self.weight * np.int8(self.requantization.gain)

    def output_sides(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of so many, before it is pooled; below 1 for too small ones."""
        sides = zip((rows, columns), self.padding, self.weight.shape[2:], self.stride, strict=True)
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side, padding, kernel, stride in sides)
        return height, width


@dataclass(frozen=True)
class Rounding(Node):
    """Levels of 8 bits rounded to levels of fewer bits and another scale; without weights and bias."""

    requantization: Requantization


@dataclass(frozen=True)
class Sum(Node):
    """The sum of two inputs, clipped to 0..255."""


@dataclass(frozen=True)
class Head(Node):
    """The last layer, linear: int32 accumulators [N, classes]; logits = scale * accumulators.

    It takes all levels of its input as features, or the sum of each channel over `pixels` pixels.

    Attributes:
        weight: int8 [classes, features], before multiplication by the gain.
        w_bits: bit width of the weights.
        gain: integer by which the weights are multiplied.
        bias: int32 [classes], or None for no bias.
        pixels: number of pixels that are summed; None for no sum.
        scale: of the accumulators.
    """

    weight: NDArray[np.int8]
    w_bits: int
    gain: int
    bias: NDArray[np.int32] | None
    pixels: int | None
    scale: float

    @property
    def scaled_weight(self) -> NDArray[np.int8]:
        """The weights times the gain, in their shape."""
        return self.weight * np.int8(self.gain)


@dataclass(frozen=True)
class IntegerNet:
    """The whole network: uint8 images [N, in_chans, size, size] to int32 accumulators [N, classes].

    Attributes:
        nodes: in the order of execution: the image first, the head last.
    """

    nodes: tuple[Node, ...]

    @property
    def image(self) -> Image:
        """The first node."""
        (image, *_) = self.nodes
        assert isinstance(image, Image)
        return image

    @property
    def head(self) -> Head:
        """The last node."""
        (*_, head) = self.nodes
        assert isinstance(head, Head)
        return head

    @property
    def layers(self) -> list[Layer]:
        """The layers with weights, but for the head."""
        return [node for node in self.nodes if isinstance(node, Layer)]

    @property
    def requantizations(self) -> list[Requantization]:
        """All of them, in order."""
        return [node.requantization for node in self.nodes if isinstance(node, (Layer, Rounding))]

    @property
    def differing(self) -> int:
        """Number of reachable accumulators, over all channels, whose level differs from the trained model's.

        One that is off by n levels counts n times.
        """
        return int(sum(r.differing.sum() for r in self.requantizations))

    @property
    def reachable(self) -> int:
        """Number of reachable accumulators over all channels."""
        return int(sum(r.reachable.sum() for r in self.requantizations))
