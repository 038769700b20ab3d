"""The 1x1 convolution of MobileNets, as a matrix product on the small maps where a CPU is faster at that.

One product of all pixels of a batch gives the same values. In bfloat16, oneDNN is faster at it than at the convolution
on maps of up to 8x8 pixels, most so on 2x2; on 16x16 the convolution is the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MOST_PIXELS = 8 * 8


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution with stride 1, without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        on_cpu = input.device.type == "cpu" and not torch.compiler.is_compiling()
        small = input.dim() == 4 and input.shape[2] * input.shape[3] <= _MOST_PIXELS
        if not (self.training and on_cpu and small):
            return super()._conv_forward(input, weight, bias)
        # a view, where the channels of a pixel lie side by side
        return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
