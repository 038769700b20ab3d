"""Fake quantization as one autograd function, in place of Brevitas' chain of elementwise operations.

The forward pass gives the bits of Brevitas' `RescalingIntQuant` in float32: divide, round half to even, clamp,
multiply. The backward pass is its straight-through gradient for input and scale. With v = x / scale, r = round(v) and
q = clamp(r, low, high):

    d out / d x     = 1 where low <= r <= high, else 0
    d out / d scale = q - v where low <= r <= high, else q

which is the gradient of LSQ (Esser et al. 2020, arXiv:1902.08153, equation 3). A binary quantizer has the levels -1 and
+1; its gradient with respect to x is 1 where |v| <= 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cnvzoo.models.compiled import compiled_for, runs_compiled


@dataclass(frozen=True)
class IntRange:
    """The integers of a quantizer: all from low to high, or -1 and +1 if binary."""

    low: int
    high: int
    binary: bool = False

    @classmethod
    def of(cls, bits: int, *, signed: bool) -> IntRange:
        """Unsigned: 0 to 2^bits - 1. Signed: -(2^(bits-1) - 1) to 2^(bits-1) - 1, and binary for 1 bit.

        The signed range is symmetric, so that a channel of weights can be negated: deployment needs that where
        BatchNorm's gamma is negative.
        """
        if not signed:
            return cls(0, 2**bits - 1)
        if bits == 1:
            return cls(-1, 1, binary=True)
        return cls(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    def round(self, v: Tensor) -> Tensor:
        """The integers (as floats) to which v = x / scale is rounded."""
        if self.binary:
            return torch.where(v >= 0, 1.0, -1.0).to(v.dtype)  # torch.where gives the default dtype
        return torch.round(v).clamp(self.low, self.high)

    def round_(self, v: Tensor) -> Tensor:
        """`round` in place."""
        if self.binary:
            return v.ge_(0).mul_(2).sub_(1)
        return v.round_().clamp_(self.low, self.high)

    def passes(self, v: Tensor) -> Tensor:
        """Where the straight-through estimator passes the gradient to v (bool)."""
        if self.binary:
            return v.abs() <= 1
        r = torch.round(v)
        return (r >= self.low) & (r <= self.high)


def _forward(x: Tensor, scale: Tensor, ints: IntRange, dtype: torch.dtype) -> Tensor:
    return (ints.round(x.float() / scale) * scale).to(dtype)


def _backward(x: Tensor, scale: Tensor, grad: Tensor, ints: IntRange) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and scale."""
    v = x.float() / scale
    passes = ints.passes(v)
    per_value = grad.float() * (ints.round(v) - torch.where(passes, v, 0.0))
    return torch.where(passes, grad, 0.0).to(x.dtype), per_value.sum_to_size(scale.shape)


@functools.cache
def _forward_kernel(binary: bool, dtype: torch.dtype, to: torch.dtype, one_row: bool) -> Callable[..., Tensor]:
    """`_forward` compiled for x of `dtype` [rows, values], of any size but with one row or several.

    It serves every range of integers that is not binary, since their ends are values for the loop.
    """
    return compiled_for(_forward, *_example(dtype, one_row), _example_range(binary), to)


@functools.cache
def _backward_kernel(
    binary: bool, dtype: torch.dtype, to: torch.dtype, one_row: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`_backward` compiled as `_forward_kernel` is."""
    x, scale = _example(dtype, one_row)
    return compiled_for(_backward, x, scale, torch.ones_like(x, dtype=to), _example_range(binary))


def _example_range(binary: bool) -> IntRange:
    return IntRange.of(1 if binary else 8, signed=True)


def _example(dtype: torch.dtype, one_row: bool) -> tuple[Tensor, Tensor]:
    x = torch.ones((1, 1 << 20) if one_row else (96, 2400), dtype=dtype)
    return x, torch.ones(len(x), 1, dtype=torch.float32)


def _as_rows(x: Tensor, rows: int, like: Tensor) -> Tensor:
    """View x as [rows, values] in the memory order of the dense tensor `like`; copies x if its order is another."""
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((rows, x.numel() // rows), (x.numel() // rows, 1))


class _FakeQuantize(torch.autograd.Function):
    # without `setup_context`, for which torch inspects the signature in every call
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, ints: IntRange, dtype: torch.dtype, compiled: bool) -> Tensor:
        ctx.ints, ctx.dtype, ctx.compiled = ints, dtype, compiled
        ctx.save_for_backward(x, scale)
        x, scale, rows = x.detach(), scale.detach(), scale.numel()
        with torch.autocast(x.device.type, enabled=False):  # else each autocast state would compile a variant
            fast = compiled and runs_compiled(x)
            forward = _forward_kernel(ints.binary, x.dtype, dtype, rows == 1) if fast else _forward
            out = forward(_as_rows(x, rows, x), scale.view(rows, 1), ints, dtype)
        return out.as_strided(x.shape, x.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, scale = (t.detach() for t in ctx.saved_tensors)
        rows = scale.numel()
        with torch.autocast(x.device.type, enabled=False):
            fast = ctx.compiled and runs_compiled(x)
            backward = _backward_kernel(ctx.ints.binary, x.dtype, ctx.dtype, rows == 1) if fast else _backward
            grad_x, grad_scale = backward(
                _as_rows(x, rows, x), scale.view(rows, 1), _as_rows(grads[0].detach(), rows, x), ctx.ints
            )
        return grad_x.as_strided(x.shape, x.stride()), grad_scale.view(scale.shape), None, None, None


class _TraceableFakeQuantize(torch.autograd.Function):
    """The same function in plain operations, which torch.compile, torch.export and torch.func can trace."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, ints: IntRange, dtype: torch.dtype, compiled: bool) -> Tensor:
        return _forward(x, scale, ints, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, ctx.ints, _, _ = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        return *_backward(x, scale, grads[0], ctx.ints), None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, ints: IntRange, dtype: torch.dtype | None = None, *, compiled: bool = True
) -> Tensor:
    """Round x to an integer of `ints` times scale; the result has the shape and memory layout of x.

    Args:
        x: floating point, any shape; the arithmetic is float32 for every dtype.
        scale: float32, positive: a scalar, or `[channels, 1, ...]` with one value per index of x's first dimension.
        ints: range of the integers.
        dtype: dtype of the result, x's by default.
        compiled: whether loops over large x may be compiled, which takes seconds the first time.
    """
    dtype = dtype or x.dtype
    # the meta device has no autocast to turn off
    if torch.compiler.is_compiling() or x.is_meta or torch._C._are_functorch_transforms_active():
        return _TraceableFakeQuantize.apply(x, scale, ints, dtype, compiled)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and not torch.jit.is_tracing():  # traces hold plain operations
        if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()
        return _FakeQuantize.apply(x, scale, ints, dtype, compiled)  # type: ignore[no-any-return]
    return _forward(x, scale, ints, dtype)


def least_squares_scale(x: Tensor, ints: IntRange, steps: int = 20) -> Tensor:
    """For each row of x, the scale of (locally) least squared error between x and its fake quantization.

    Starts from the scale that clips nothing, and alternates between rounding and the least-squares scale for the
    rounded values (Lloyd's iteration with uniform levels). It uses maxima and sums only, so it is deterministic on CUDA
    too.

    Args:
        x: floating point [channels, values].
        ints: range of the integers.
        steps: number of iterations.

    Returns:
        float32 [channels], positive.
    """
    tiny = torch.finfo(torch.float32).tiny ** 0.5
    x = x.detach().float()
    scale = x.abs().amax(1, keepdim=True).clamp_min(tiny) / ints.high
    q, product = torch.empty_like(x), torch.empty_like(x)  # new tensors of this size in each step would take most time
    for _ in range(steps):
        ints.round_(torch.div(x, scale, out=q))
        energy = torch.mul(q, q, out=product).sum(1, keepdim=True)
        scale = torch.where(energy > 0, torch.mul(x, q, out=product).sum(1, keepdim=True) / energy, scale)
        scale = scale.clamp_min(tiny)
    return scale.squeeze(1)
