"""The arithmetic of quantized residual blocks: sums of integers on one scale, and the inputs of blocks.

The output of a block has 8 bits. It goes two ways: into the sum of the next block, and, rounded to fewer bits, into its
convolutions. Both are autograd functions with as few passes over memory as possible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cnvzoo.models.compiled import EXAMPLE_HIGH, compiled_for
from cnvzoo.models.fake_quant import IntRange

ADDEND = IntRange(-128, 127)  # of what is added to the output of a residual block


def sum_forward(v: Tensor, residual: Tensor, inverse: Tensor, rounded: bool) -> Tensor:
    """What `add_fake_quantized` rounds and clamps to the integers of the result: within half a unit of these.

    Args:
        v: x / scale, float32.
        inverse: 1 / scale.
        residual, rounded: as in `add_fake_quantized`.
    """
    u = residual.float() * inverse  # in bfloat16, one above 127 that is rounded already may become its neighbour
    return _addend(v) + (u if rounded else _addend(u))


def sum_backward(
    v: Tensor, y: Tensor, grad: Tensor, residual: Tensor | None, inverse: Tensor, high: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `add_fake_quantized` in float32: with respect to x and the residual, and, per value, to the scale.

    They are straight-through: 1 where 0 < y < high * scale, whatever happened to the summands. With respect to the
    scale that is the error of rounding. A residual that is rounded already has it in the layer that rounded it.

    Args:
        v: x / scale, float32.
        y: the result, floating point.
        grad: gradient with respect to y, float32.
        residual: one that was not rounded already, else None.
        inverse: 1 / scale.
        high: as in `add_fake_quantized`.
    """
    below = y.float() * inverse < high - 0.5
    grad = torch.where(y > 0, grad, 0.0)
    error = torch.round(v) - v
    if residual is not None:
        u = residual.float() * inverse
        error = error + (torch.round(u) - u)
    return torch.where(below, grad, 0.0), grad * torch.where(below, error, high)


def _addend(v: Tensor) -> Tensor:
    return torch.round(v).clamp(ADDEND.low, ADDEND.high)


def _add(x: Tensor, residual: Tensor, scale: Tensor, high: int, rounded: bool, dtype: torch.dtype) -> Tensor:
    inverse = 1 / scale
    total = sum_forward(x.float() * inverse, residual, inverse, rounded)
    return (torch.round(total).clamp(0, high) * scale).to(dtype)


class _AddFakeQuantized(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, residual: Tensor, scale: Tensor, high: int, rounded: bool, dtype: torch.dtype) -> Tensor:
        return _add(x, residual, scale, high, rounded, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, residual, scale, ctx.high, rounded, _ = inputs
        ctx.residual_dtype = residual.dtype
        ctx.save_for_backward(x, output, None if rounded else residual, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, y, residual, scale = ctx.saved_tensors
        inverse = 1 / scale
        grad, per_value = sum_backward(x.float() * inverse, y, grads[0].float(), residual, inverse, ctx.high)
        return grad.to(x.dtype), grad.to(ctx.residual_dtype), per_value.sum(), None, None, None


def add_fake_quantized(
    x: Tensor, residual: Tensor, scale: Tensor, high: int, rounded: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """The sum of two tensors whose integers are added: clamp(clamp(round(x / scale), -128, 127) + r, 0, high) * scale.

    Here r = round(residual / scale), clamped to -128..127 too unless it is `rounded` already.

    Args:
        x, residual: floating point, of one shape; the arithmetic is float32 for every dtype.
        scale: float32 scalar, positive: the scale of both and of the result.
        high: the largest integer of the result; the smallest is 0.
        rounded: whether the residual consists of multiples of the scale, from 0 to high.
        dtype: dtype of the result, x's by default.
    """
    add = _AddFakeQuantized.apply if torch.is_grad_enabled() and not torch.jit.is_tracing() else _add
    return add(x, residual, scale, high, rounded, dtype or x.dtype)  # type: ignore[no-any-return]


def _round(x: Tensor, inverse: Tensor, scale: Tensor, high: int) -> Tensor:
    return (torch.round(x.float() * inverse).clamp(0, high) * scale).to(x.dtype)


def _round_backward(
    x: Tensor, inverse: Tensor, high: int, grad: Tensor, direct: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and scale; `direct`: that of x's other use, or None."""
    v = x.float() * inverse
    r = torch.round(v)
    q = r.clamp(0, high)
    g = grad.float()
    through = torch.where(r == q, g, 0.0)
    total = through if direct is None else through + direct.float()
    return total.to(x.dtype), (g * torch.where(r == q, q - v, q)).sum(1).sum()


@functools.cache
def _round_kernel(dtype: torch.dtype) -> Callable[..., Tensor]:
    return compiled_for(_round, torch.ones(96, 1 << 14, dtype=dtype), torch.ones(()), torch.ones(()), EXAMPLE_HIGH)


@functools.cache
def _round_backward_kernel(dtype: torch.dtype, has_direct: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    x, inverse = torch.ones(96, 1 << 14, dtype=dtype), torch.ones(())
    direct = torch.ones_like(x) if has_direct else None
    return compiled_for(_round_backward, x, inverse, EXAMPLE_HIGH, torch.ones_like(x), direct)


class _SplitRounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, high: int) -> tuple[Tensor, Tensor]:
        x, scale = x.detach(), scale.detach()
        inverse = 1 / scale
        rounded = _round_kernel(x.dtype)(_per_image(x), inverse, scale, high)
        ctx.high = high
        ctx.save_for_backward(x, inverse)
        ctx.set_materialize_grads(False)
        return x.view_as(x), rounded.as_strided(x.shape, x.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        direct, grad = grads
        if grad is None:
            return direct, None, None
        x, inverse = ctx.saved_tensors
        grad, direct = (None if g is None else _per_image(_like(g, x)) for g in (grad, direct))
        backward = _round_backward_kernel(x.dtype, direct is not None)
        total, grad_scale = backward(_per_image(x), inverse, ctx.high, grad, direct)
        return total.as_strided(x.shape, x.stride()), grad_scale, None


def _per_image(x: Tensor) -> Tensor:
    """A view of dense memory as [images, values], in its order."""
    values = x[0].numel()
    return x.as_strided((len(x), values), (values, 1))


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in the memory order and dtype of x."""
    grad = grad.detach()
    return grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)


def split_rounded(x: Tensor, scale: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """x, and x rounded to an integer from 0 to `high` times scale: as `fake_quantize`, for two uses of x.

    Compiled for CPUs: the gradients of both ways are added in the same pass.

    Args:
        x: [N, C, H, W], dense in the order of channels_last, in bfloat16 or float32.
        scale: float32 scalar, positive.
        high: the largest integer.
    """
    return _SplitRounded.apply(x, scale, high)  # type: ignore[no-any-return]
