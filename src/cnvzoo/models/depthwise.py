"""The 3x3 depthwise convolution of MobileNets, with gradients by the ways that are fast on a CPU.

oneDNN, which computes convolutions there, has no fast bfloat16 code for two of these gradients: that of the images at
stride 2, and that of the filters on maps smaller than they are. Both have another, fast form of the same values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv2d(nn.Conv2d):
    """A 3x3 convolution of each channel by itself, padded by 1, without bias.

    Args:
        channels: of the input and the output.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(channels, channels, 3, stride, 1, groups=channels, bias=False)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        on_cpu = input.device.type == "cpu" and input.dim() == 4 and not torch.compiler.is_compiling()
        if not (self.training and on_cpu and torch.is_grad_enabled()):
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled("cpu"):
            input, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (input, weight))
        return _Depthwise.apply(input, weight, self.stride[0])  # type: ignore[no-any-return]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=1, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        (grad,) = grads
        return (
            _grad_of_images(grad, x, weight, ctx.stride) if for_x else None,
            _grad_of_filters(grad, x, weight, ctx.stride) if for_weight else None,
            None,
        )


def _grad_of_images(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The gradients, set apart by zeros where a stride left pixels out, convolved with the filters turned round."""
    if stride > 1:
        spread = torch.zeros_like(x)
        spread[:, :, ::stride, ::stride] = grad
        grad = spread
    return F.conv2d(grad, weight.flip(2, 3), padding=1, groups=len(weight))


def _grad_of_filters(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """PyTorch's own; maps smaller than the filters get rows and columns of zeros, which add nothing to it."""
    more = 3 - min(x.shape[2:])
    if more > 0:
        x = F.pad(x, (0, more * stride, 0, more * stride))
        grad = F.pad(grad, (0, more, 0, more))
    strides, padding = [stride, stride], [1, 1]
    _, of_filters, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, strides, padding, [1, 1], False, [0, 0], len(weight), [False, True, False]
    )
    return of_filters  # type: ignore[no-any-return]
