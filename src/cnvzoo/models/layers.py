"""Where the random numbers of a model that is built come from: the program's generator, one of its own, or nowhere.

`create_model` initialises as any torch module does, from torch's generator for the CPU. A run has a seed of its own,
and a model whose values come from a file needs no numbers at all. Both leave the generator of the program as it is at
every moment, for all of its threads, which saving and restoring its state would not.


CNV, the VGG-like net of FINN, once: the float and the quantized model are this graph with other layers.

Umuroglu et al., "FINN", 2017 (arXiv:1612.07119), section 5: six 3x3 convolutions without padding, two max pools,
two hidden linear layers; BatchNorm after every layer but the last. No layer has a bias.


The 3x3 depthwise convolution of MobileNets, with gradients by the ways that are fast on a CPU.

oneDNN, which computes convolutions there, has no fast bfloat16 code for two of these gradients: that of the images at
stride 2, and that of the filters on maps smaller than they are. Both have another, fast form of the same values.


The 1x1 convolution of MobileNets, as a matrix product on the small maps where a CPU is faster at that.

One product of all pixels of a batch gives the same values. In bfloat16, oneDNN is faster at it than at the convolution
on maps of up to 8x8 pixels, most so on 2x2; on 16x16 the convolution is the faster one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.overrides import TorchFunctionMode

_skipped: ContextVar[bool] = ContextVar("initialization_skipped", default=False)

# what fills a tensor with random numbers, as torch hands it to a mode: the methods, and the functions of torch.nn.init
# that are handed over before they come to one
_DRAWING = {
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.bernoulli_,
    torch.Tensor.random_,
    init.uniform_,
    init.normal_,
    init.kaiming_uniform_,
}


class _Draws(TorchFunctionMode):
    """Has this thread's tensors filled from `generator`; without one, they keep the values that they have."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWING:
            return func(*args, **kwargs)
        if self._generator is None:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **{**kwargs, "generator": self._generator})


@contextmanager
def without_initialization() -> Iterator[None]:
    """Models built inside may have any values, and draw no random numbers: every value has to be loaded."""
    token = _skipped.set(True)
    try:
        with _Draws(None):
            yield
    finally:
        _skipped.reset(token)


@contextmanager
def initialized_from(seed: int) -> Iterator[None]:
    """Models built inside on the CPU have the values that they would have after `torch.manual_seed(seed)`."""
    with _Draws(torch.Generator().manual_seed(seed)):
        yield


def skips_initialization() -> bool:
    """Whether what is only a start for training can be left out, here and now."""
    return _skipped.get()


def init_weight(weight: Tensor) -> None:
    """He initialisation: without biases, it keeps an untrained CNV's signal alive down to the logits."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


class FullFieldMatmul(nn.Conv2d):
    """A convolution that trains as a matrix product where its kernel covers all of its input, several times faster."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.training or input.shape[2:] != weight.shape[2:] or self.padding != (0, 0):
            return super()._conv_forward(input, weight, bias)
        # in the order in which both lie in memory, channels last
        rows, columns = (t.permute(0, 2, 3, 1).flatten(1) for t in (input, weight))
        return nn.functional.linear(rows, columns, bias)[:, :, None, None]


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
