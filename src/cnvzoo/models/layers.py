"""The layers of float models, with convolutions that are faster in training than torch's own.

A topology is written once, for a factory of layers: `FloatLayers` here, `QuantLayers` of `cnvzoo.models.quant_layers`.

The convolutions are `nn.Conv2d` in state, export and evaluation. They differ in training, mostly on CPUs, where oneDNN
computes convolutions and has no fast bfloat16 code for some of the shapes in CNV and MobileNet.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which autocast converts x before a convolution: its own without one, and for float64 always."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


class FullFieldConv2d(nn.Conv2d):
    """nn.Conv2d that trains as a matrix product where the kernel is as large as the input: several times faster.

    The arguments are those of `nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            isinstance(input, fx.Proxy)
            or not self.training
            or input.shape[2:] != weight.shape[2:]
            or self.padding != (0, 0)
        ):
            return super()._conv_forward(input, weight, bias)
        # in their order in memory, channels last, so nothing is copied
        rows, columns = (t.permute(0, 2, 3, 1).flatten(1) for t in (input, weight))
        return nn.functional.linear(rows, columns, bias)[:, :, None, None]


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d for a 3x3 depthwise convolution with stride 1 or 2, padded by 1.

    oneDNN has no fast bfloat16 code for two of its gradients: that of the input at stride 2, and that of the weights on
    maps smaller than 3x3. In training on a CPU both are computed by convolutions that it is fast at, but not for a
    layer with a bias, which it has only after a BatchNorm was folded into it.

    The arguments are those of `nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, fx.Proxy):  # torch.fx traces the plain convolution
            return super()._conv_forward(input, weight, bias)
        on_cpu = input.device.type == "cpu" and input.dim() == 4 and not torch.compiler.is_compiling()
        if not (self.training and on_cpu and torch.is_grad_enabled()) or bias is not None:
            return super()._conv_forward(input, weight, bias)
        input, weight = (t.to(autocast_dtype(t)) for t in (input, weight))
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
        needs_x, needs_weight, _ = ctx.needs_input_grad
        (grad,) = grads
        return (
            _input_gradient(grad, x, weight, ctx.stride) if needs_x else None,
            _weight_gradient(grad, x, weight, ctx.stride) if needs_weight else None,
            None,
        )


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The transposed convolution, as a convolution of `grad`, with zeros between its pixels, by the flipped weights."""
    if stride > 1:
        dilated = torch.zeros_like(x)
        dilated[:, :, ::stride, ::stride] = grad
        grad = dilated
    return F.conv2d(grad, weight.flip(2, 3), padding=1, groups=len(weight))


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """PyTorch's own, on maps padded with zeros to at least the size of the weights; zeros add nothing to it."""
    missing = 3 - min(x.shape[2:])
    if missing > 0:
        x = F.pad(x, (0, missing * stride, 0, missing * stride))
        grad = F.pad(grad, (0, missing, 0, missing))
    strides, padding = [stride, stride], [1, 1]
    _, weight_gradient, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, strides, padding, [1, 1], False, [0, 0], len(weight), [False, True, False]
    )
    return weight_gradient  # type: ignore[no-any-return]


class PointwiseConv2d(nn.Conv2d):
    """nn.Conv2d for a 1x1 convolution with stride 1 that trains on a CPU as a matrix product.

    On small maps only: in bfloat16, oneDNN's matrix product of all pixels of a batch is faster than its convolution on
    maps of up to 8x8 pixels, and slower on 16x16. A layer with a bias, which it has only after a BatchNorm was folded
    into it, is computed as a convolution.

    The arguments are those of `nn.Conv2d`.
    """

    _MAX_PIXELS = 8 * 8

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, fx.Proxy):  # torch.fx traces the plain convolution
            return super()._conv_forward(input, weight, bias)
        on_cpu = input.device.type == "cpu" and not torch.compiler.is_compiling()
        small = input.dim() == 4 and input.shape[2] * input.shape[3] <= self._MAX_PIXELS
        if not (self.training and on_cpu and small) or bias is not None:
            return super()._conv_forward(input, weight, bias)
        # a view of channels_last memory, so nothing is copied
        return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


class Layers(Protocol):
    """A factory of the layers of a topology. Its convolutions have no bias."""

    def input(self) -> nn.Module:
        """What images go through first."""
        ...

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        first: bool = False,
    ) -> nn.Module:
        """A convolution; `first` for that of the images."""
        ...

    def depthwise(self, channels: int, stride: int) -> nn.Module:
        """A 3x3 convolution of each channel by itself, padded by 1."""
        ...

    def pointwise(self, in_channels: int, out_channels: int) -> nn.Module:
        """A 1x1 convolution."""
        ...

    def linear(self, in_features: int, out_features: int, *, last: bool, bias: bool = False) -> nn.Module:
        """A linear layer; `last` for that of the logits."""
        ...

    def relu(self) -> nn.Module:
        """The activation after a BatchNorm."""
        ...

    def residual_relu(self, uses: int) -> nn.Module:
        """The activation after residual additions, which all blocks of a stage share.

        Args:
            uses: how often one forward pass of the model uses it.
        """
        ...

    def block_input(self) -> nn.Module:
        """What the output of a `residual_relu` goes through before the convolutions of the next block."""
        ...

    def finish(self, model: nn.Module, only: nn.Module | None = None) -> None:
        """Called when the weights of a model have their initial values; `only` is a layer that was added later."""
        ...


class FloatLayers:
    """Plain torch layers."""

    def input(self) -> nn.Module:
        return nn.Identity()

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        first: bool = False,
    ) -> nn.Module:
        full_field = kernel > 1 and padding == 0
        return (FullFieldConv2d if full_field else nn.Conv2d)(
            in_channels, out_channels, kernel, stride, padding, bias=False
        )

    def depthwise(self, channels: int, stride: int) -> nn.Module:
        return DepthwiseConv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)

    def pointwise(self, in_channels: int, out_channels: int) -> nn.Module:
        return PointwiseConv2d(in_channels, out_channels, 1, bias=False)

    def linear(self, in_features: int, out_features: int, *, last: bool, bias: bool = False) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def relu(self) -> nn.Module:
        return nn.ReLU(inplace=True)

    def residual_relu(self, uses: int) -> nn.Module:
        return nn.ReLU(inplace=True)

    def block_input(self) -> nn.Module:
        return nn.Identity()

    def finish(self, model: nn.Module, only: nn.Module | None = None) -> None:
        pass
