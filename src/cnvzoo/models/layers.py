"""The layers of float models: initialization, and convolutions that are faster in training than torch's own.

A topology is written once, for a factory of layers: `FloatLayers` here, `QuantLayers` of `cnvzoo.models.quant_layers`.

The random numbers of a new model come from torch's default CPU generator, as for any torch module. Inside
`initialized_from(seed)` they come from a generator with that seed, and inside `without_initialization()`, for models
whose values are loaded from a file, none are drawn. Both leave the default generator alone. Saving and restoring its
state instead would disturb other threads of the program.

The convolutions are `nn.Conv2d` in state, export and evaluation. They differ in training, mostly on CPUs, where oneDNN
computes convolutions and has no fast bfloat16 code for some of the shapes in CNV and MobileNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn import init
from torch.overrides import TorchFunctionMode

_skipped: ContextVar[bool] = ContextVar("initialization_skipped", default=False)

# The functions that fill a tensor with random numbers, as torch passes them to a TorchFunctionMode: methods of Tensor,
# and those functions of torch.nn.init that are passed before they call such a method.
_RANDOM_FILLS = {
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.bernoulli_,
    torch.Tensor.random_,
    torch.Tensor.cauchy_,
    torch.Tensor.exponential_,
    torch.Tensor.geometric_,
    torch.Tensor.log_normal_,
    init.uniform_,
    init.normal_,
    init.kaiming_uniform_,
}

# Those that make a tensor of random numbers. No model of this library calls them; registered ones may.
_RANDOM_TENSORS = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    torch.poisson,
    torch.binomial,
    torch.rand_like,
    torch.randn_like,
    torch.randint_like,
    torch.Tensor.bernoulli,
    torch.Tensor.multinomial,
}


class _RandomFillsFrom(TorchFunctionMode):
    """Random numbers in this thread come from `generator`, but for calls that are given one of their own.

    With None, tensors keep the values that they have. New tensors have random numbers then too, from a generator of
    their own.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            if self._generator is None:
                return args[0] if args else kwargs["tensor"]
        elif func not in _RANDOM_TENSORS:
            return func(*args, **kwargs)
        if kwargs.get("generator") is None and not any(isinstance(arg, torch.Generator) for arg in args):
            kwargs = {**kwargs, "generator": self._generator or torch.Generator()}
        return func(*args, **kwargs)


@contextmanager
def without_initialization() -> Iterator[None]:
    """Models built inside draw no random numbers and have arbitrary values, all of which have to be loaded."""
    token = _skipped.set(True)
    try:
        with _RandomFillsFrom(None):
            yield
    finally:
        _skipped.reset(token)


@contextmanager
def initialized_from(seed: int) -> Iterator[None]:
    """Models built inside, on the CPU, have the values that they would have after `torch.manual_seed(seed)`."""
    with _RandomFillsFrom(torch.Generator().manual_seed(seed)):
        yield


def skips_initialization() -> bool:
    """Whether this code runs inside `without_initialization()`, so that initial values need not be computed."""
    return _skipped.get()


def init_weight(weight: Tensor) -> None:
    """He initialization (He et al. 2015, arXiv:1502.01852), which keeps the variance of activations in a CNV."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


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
