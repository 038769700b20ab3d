"""BatchNorm, activation and max pool in training as one autograd function, with two passes over memory each way.

    z = gamma * (x - mean) / sqrt(var + eps) + beta          statistics of the batch, as in nn.BatchNorm2d
    y = max_pool(act(z + residual))                          act: none, ReLU, or an unsigned quantizer

A quantizer rounds z and the residual before it adds them (`cnvzoo.models.residual.add_fake_quantized`).

As separate layers they take a dozen passes, which on a CPU are limited by memory bandwidth (docs/design.md, Decisions).
The gradient of BatchNorm is that of Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3; the quantizer is that of
`cnvzoo.models.fake_quant`. The arithmetic between x and y is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from cnvzoo.models.compiled import EXAMPLE_HIGH, compiled_for, runs_compiled
from cnvzoo.models.residual import split_rounded, sum_backward, sum_forward


class Quantizer(Protocol):
    """An unsigned quantizer, with the integers 0 to `ints.high`."""

    ints: Any

    def positive_scale(self, x: Tensor) -> Tensor: ...


class QuantizedActivation(nn.Module):
    """A layer that applies an unsigned quantizer, which is a ReLU too, since its lowest level is zero."""

    activation_quantizer: Quantizer | None  # None where Brevitas' proxy has to run, or it is disabled


class QuantizedResidualActivation(QuantizedActivation):
    """A quantized activation that adds: called as `layer(x, residual, rounded=)`, or with x alone."""


@dataclass(frozen=True)
class _Variant:
    """What a forward and a backward loop are compiled for; other sizes and the range of the integers are free."""

    channels: int
    dtype: torch.dtype
    relu: bool
    quantizes: bool
    residual: bool
    pool: bool
    rounded: bool = False  # of a residual that a quantizer adds: whether it has been rounded already


class _Norm(NamedTuple):
    """BatchNorm of a batch, z = x * slope + offset; all [channels]."""

    mean: Tensor
    inverse_std: Tensor
    slope: Tensor
    offset: Tensor


def _batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> _Norm:
    """The BatchNorm of x [images, ..., channels] by the batch's statistics; updates the running ones."""
    values = x.float().flatten(1, -2)
    count = values.shape[0] * values.shape[1]
    # sums per image, then double precision, since E[x^2] - E[x]^2 cancels in float32
    mean = values.sum(1).sum(0, dtype=torch.float64) / count
    var = (values.square().sum(1).sum(0, dtype=torch.float64) / count - mean.square()).clamp_min(0)
    inverse_std = torch.rsqrt(var + eps).float()
    mean = mean.float()
    running_mean.lerp_(mean, momentum)
    running_var.lerp_((var * (count / (count - 1))).float(), momentum)
    slope = gamma * inverse_std
    return _Norm(mean, inverse_std, slope, beta - mean * slope)


def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor, running_var: Tensor, scale: Tensor | None,
    residual: Tensor | None, momentum: float, eps: float, variant: _Variant, inverse: Tensor | None, high: int | None,
) -> tuple[Tensor, Tensor | None, _Norm]:  # fmt: skip
    """y; for a pool, the position (0 to 3, row by row) of each maximum; and the BatchNorm, divided by the scale."""
    norm = _batch_norm(x, gamma, beta, running_mean, running_var, momentum, eps)
    if scale is not None:
        norm = norm._replace(slope=norm.slope / scale, offset=norm.offset / scale)
    v = x.float() * norm.slope + norm.offset
    if residual is not None and inverse is not None:
        v = sum_forward(v, residual, inverse, variant.rounded)
    elif residual is not None:
        v = v + residual.float()
    if variant.relu:
        v = torch.relu(v)
    if high is not None:
        v = torch.round(v).clamp(0, high)
    corner = None
    if variant.pool:
        values = [v[:, :, row, :, col] for row in (0, 1) for col in (0, 1)]
        v = torch.maximum(torch.maximum(values[0], values[1]), torch.maximum(values[2], values[3]))
        corner = torch.where(values[2] == v, 2.0, 3.0)
        corner = torch.where(values[0] == v, 0.0, torch.where(values[1] == v, 1.0, corner)).to(torch.bfloat16)
    return (v if scale is None else v * scale).to(x.dtype), corner, norm


def _backward(
    x: Tensor, y: Tensor | None, grad: Tensor, corner: Tensor | None, corners: Tensor, norm: _Norm, gamma: Tensor,
    variant: _Variant, high: int | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients with respect to x, residual, gamma, beta and scale (None where there is none).

    The vectors after them are returned because the compiler then computes them once and stores them, instead of
    recomputing them for every value of x.
    """
    xf, g = x.float(), grad.float()
    if corner is not None:
        g = torch.where(corner[:, :, None, :, None].float() == corners, g[:, :, None, :, None], 0.0)
    over_rows = tuple(range(1, x.dim() - 1))
    grad_scale = grad_residual = None
    dz = g
    if high is not None:
        v = xf * norm.slope + norm.offset
        r = torch.round(v)
        q = r.clamp(0, high)
        dz = torch.where(r == q, g, 0.0)
        grad_scale = (g * torch.where(r == q, q - v, q)).sum(over_rows).sum()
    elif variant.relu:
        dz = torch.where((xf * norm.slope + norm.offset if y is None else y) > 0, g, 0.0)
    if variant.residual:
        grad_residual = dz.to(x.dtype)
    grad_beta = dz.sum(over_rows).sum(0)
    grad_gamma = (dz * (xf - norm.mean)).sum(over_rows).sum(0) * norm.inverse_std
    grad_x, *vectors = _norm_backward(x, dz, norm, gamma, grad_gamma, grad_beta)
    return grad_x, grad_residual, grad_gamma, grad_beta, grad_scale, *vectors


def _norm_backward(
    x: Tensor, dz: Tensor, norm: _Norm, gamma: Tensor, grad_gamma: Tensor, grad_beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient with respect to x, given that with respect to z, and the vectors that it is computed from."""
    count = x.numel() // x.shape[-1]
    slope = gamma * norm.inverse_std
    along = -slope * norm.inverse_std * grad_gamma / count
    offset = -slope * grad_beta / count - along * norm.mean
    grad_x = (dz.float() * slope + (x.float() * along + offset)).to(x.dtype)
    return grad_x, slope, along, offset


def _sum_backward(
    x: Tensor, y: Tensor, grad: Tensor, residual: Tensor | None, norm: _Norm, inverse: Tensor, high: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to residual (which is that to z too), gamma, beta and scale of a quantizer that adds.

    `_norm_backward` follows in a loop of its own: reading that gradient is faster than computing it again.
    """
    xf, over_rows = x.float(), tuple(range(1, x.dim() - 1))
    v = xf * norm.slope + norm.offset
    dz, per_value = sum_backward(v, y, grad.float(), residual, inverse, high)
    grad_gamma = (dz * (xf - norm.mean)).sum(over_rows).sum(0) * norm.inverse_std
    return dz.to(x.dtype), grad_gamma, dz.sum(over_rows).sum(0), per_value.sum(over_rows).sum()


@functools.cache
def _kernels(variant: _Variant) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def example(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.ones(*sizes, variant.channels, dtype=dtype)
        torch._dynamo.mark_static(x, x.dim() - 1)
        return x

    sizes = (94, 13, 2, 15, 2) if variant.pool else (94, 870)
    x = example(*sizes, dtype=variant.dtype)
    gamma, beta, mean, var = example(), example(), example(), example()
    scale = torch.ones(()) if variant.quantizes else None
    residual = example(*sizes, dtype=variant.dtype) if variant.residual else None
    inverse = None if scale is None or residual is None else 1 / scale
    high = EXAMPLE_HIGH if variant.quantizes else None
    arguments = (x, gamma, beta, mean, var, scale, residual, 0.1, 1e-5, variant, inverse, high)
    forward = compiled_for(_forward, *arguments)
    y, corner, norm = forward(*arguments)
    for result in (y, corner, *norm):
        if result is not None:
            torch._dynamo.mark_static(result, result.dim() - 1)
    grad = torch.ones_like(y)
    torch._dynamo.mark_static(grad, grad.dim() - 1)
    if inverse is None:
        seen = y if variant.residual and variant.relu else None
        return forward, compiled_for(_backward, x, seen, grad, corner, _corners(), norm, gamma, variant, high)
    other = None if variant.rounded else residual
    sums = compiled_for(_sum_backward, x, y, grad, other, norm, inverse, high)
    dz, grad_gamma, grad_beta, _ = sums(x, y, grad, other, norm, inverse, high)
    for result in (dz, grad_gamma, grad_beta):
        torch._dynamo.mark_static(result, result.dim() - 1)
    rest = compiled_for(_norm_backward, x, dz, norm, gamma, grad_gamma, grad_beta)

    def backward(
        x: Tensor, y: Tensor, grad: Tensor, residual: Tensor | None, norm: _Norm, gamma: Tensor, inverse: Tensor,
        high: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dz, grad_gamma, grad_beta, grad_scale = sums(x, y, grad, residual, norm, inverse, high)
        grad_x, *_ = rest(x, dz, norm, gamma, grad_gamma, grad_beta)
        return grad_x, dz, grad_gamma, grad_beta, grad_scale

    return forward, backward


def _corners() -> Tensor:
    """The positions in a 2x2 window, 0 to 3, to broadcast over [images, rows, 2, columns, 2, channels]."""
    return torch.arange(4.0).view(2, 1, 2, 1)


def _rows(x: Tensor, pool: bool) -> Tensor:
    """View a dense channels_last [N, C, H, W] as [N, H * W, C], or as [N, H / 2, 2, W / 2, 2, C]."""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1)
    return x.view(n, h // 2, 2, w // 2, 2, c) if pool else x.view(n, h * w, c)


def _images(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """View [N, ..., C] as a channels_last [N, C, H, W]."""
    return rows.view(len(rows), *size, rows.shape[-1]).permute(0, 3, 1, 2)


class NormAct(torch.autograd.Function):
    """The fused layers of `norm_act`, which calls it where they can be fused."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor | None, residual: Tensor | None,
        norm: nn.BatchNorm2d, variant: _Variant, high: int | None,
    ) -> Tensor:  # fmt: skip
        # detached and without autocast, since the compiler makes a variant for each combination of these
        x, gamma, beta = x.detach(), gamma.detach(), beta.detach()
        scale = None if scale is None else scale.detach()
        inverse = 1 / scale if scale is not None and variant.residual else None
        residual = None if residual is None else _rows(residual.detach(), False)
        with torch.autocast(x.device.type, enabled=False):
            forward, _ = _kernels(variant)
            y, corner, batch_norm = forward(
                _rows(x, variant.pool), gamma, beta, norm.running_mean, norm.running_var, scale, residual,
                norm.momentum, norm.eps, variant, inverse, high,
            )  # fmt: skip
        ctx.variant, ctx.high = variant, high
        seen = y if variant.residual and (variant.relu or inverse is not None) else None
        other = residual if inverse is not None and not variant.rounded else None
        ctx.save_for_backward(x, seen, other, corner, gamma, inverse, *batch_norm)
        h, w = x.shape[2:]
        return _images(y, (h // 2, w // 2) if variant.pool else (h, w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, seen, other, corner, gamma, inverse, *batch_norm = ctx.saved_tensors
        variant: _Variant = ctx.variant
        high: int | None = ctx.high
        grad = grads[0].detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        grad = grad if variant.pool else grad.flatten(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            _, backward = _kernels(variant)
            rows, norm = _rows(x, variant.pool), _Norm(*batch_norm)
            if inverse is not None:
                gradients = backward(rows, seen, grad, other, norm, gamma, inverse, high)
            else:
                gradients = backward(rows, seen, grad, corner, _corners(), norm, gamma, variant, high)
        grad_x, grad_residual, grad_gamma, grad_beta, grad_scale, *_ = gradients
        if grad_residual is not None:
            grad_residual = _images(grad_residual, x.shape[2:])
        return _images(grad_x, x.shape[2:]), grad_gamma, grad_beta, grad_scale, grad_residual, None, None, None


def norm_act(
    x: Tensor,
    norm: nn.BatchNorm2d,
    act: nn.Module | None = None,
    *,
    residual: Tensor | None = None,
    pool: nn.MaxPool2d | None = None,
    rounded: bool = True,
) -> Tensor:
    """pool(act(norm(x) + residual)), fused in training where this is possible and faster, else layer by layer.

    Args:
        x: [N, C, H, W].
        norm: BatchNorm of C channels; fused if it is just `nn.BatchNorm2d`. No layer with hooks is fused.
        act: any layer; fused if it is ReLU or a QuantizedActivation. None: no activation.
        residual: added before the activation, like x in shape. None: nothing is added. A QuantizedActivation adds it
            if it is a QuantizedResidualActivation.
        pool: fused if it takes 2x2 windows with stride 2. None: no pool.
        rounded: of the residual of a QuantizedResidualActivation: whether it is an earlier output of it.
    """
    quantizer = act.activation_quantizer if isinstance(act, QuantizedActivation) else None
    if not _fuses(x, norm, act, quantizer, residual, pool):
        x = norm(x)
        if residual is not None and isinstance(act, QuantizedResidualActivation):
            x = act(x, residual, rounded=rounded)
        else:
            x = x if residual is None else x + residual
            x = x if act is None else act(x)
        return x if pool is None else pool(x)
    high = None if quantizer is None else quantizer.ints.high
    variant = _Variant(
        x.shape[1], x.dtype, isinstance(act, nn.ReLU), quantizer is not None, residual=residual is not None,
        pool=pool is not None, rounded=rounded and residual is not None and quantizer is not None,
    )  # fmt: skip
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    scale = None if quantizer is None else quantizer.positive_scale(x)
    return NormAct.apply(x, norm.weight, norm.bias, scale, residual, norm, variant, high)  # type: ignore[no-any-return]


def block_inputs(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(x, layer(x)): what a residual block adds to, and what its convolutions take; fused in training where possible.

    Args:
        x: output of the block before, [N, C, H, W].
        layer: any layer; fused if it is a QuantizedActivation.
    """
    if not isinstance(layer, QuantizedActivation) or isinstance(x, fx.Proxy):
        return x, layer(x)
    quantizer = layer.activation_quantizer
    dense = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    supported = x.dtype in (torch.float32, torch.bfloat16) and dense and x.requires_grad and not has_hooks(layer)
    if quantizer is None or not (layer.training and torch.is_grad_enabled() and supported and runs_compiled(x)):
        return x, layer(x)
    return split_rounded(x, quantizer.positive_scale(x), quantizer.ints.high)


def _fuses(
    x: Tensor, norm: nn.BatchNorm2d, act: nn.Module | None, quantizer: Quantizer | None,
    residual: Tensor | None, pool: nn.MaxPool2d | None,
) -> bool:  # fmt: skip
    if isinstance(x, fx.Proxy) or not (norm.training and torch.is_grad_enabled() and runs_compiled(x)):
        return False
    if not (type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None):
        return False
    if type(pool) not in (nn.MaxPool2d, type(None)) or has_hooks(norm, act, pool):
        return False
    supported_dtype = x.dtype in (torch.float32, torch.bfloat16) and norm.weight.dtype == torch.float32
    dense = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.shape[2] * x.shape[3] > 1
    supported_act = act is None or quantizer is not None or type(act) is nn.ReLU
    adds = quantizer is None or isinstance(act, QuantizedResidualActivation)
    supported_residual = residual is None or (
        adds and pool is None and residual.dtype == x.dtype and residual.stride() == x.stride()
    )
    return supported_dtype and dense and supported_act and supported_residual and (pool is None or _is_2x2(x, pool))


def has_hooks(*layers: nn.Module | None) -> bool:
    """Whether something is called before or after one of the layers, which a fused step would leave out."""
    return bool(has_any_global_hook()) or any(
        layer is not None
        and (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )


def _is_2x2(x: Tensor, pool: nn.MaxPool2d) -> bool:
    """Whether a pool has 2x2 windows with stride 2 that cover x exactly, more than one along each side."""
    two_by_two = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (2, 2, 0, 1, False)
    h, w = x.shape[2:]
    return two_by_two and h % 2 == w % 2 == 0 and min(h, w) > 2


class NormActSequential(nn.Sequential):
    """nn.Sequential that runs each BatchNorm2d and the activation and max pool that follow it through `norm_act`."""

    def forward(self, input: Tensor) -> Tensor:
        x, layers = input, list(self)
        while layers:
            layer = layers.pop(0)
            if not isinstance(layer, nn.BatchNorm2d):
                x = layer(x)
                continue
            act = next((after for after in layers[:1] if isinstance(after, (nn.ReLU, QuantizedActivation))), None)
            del layers[: act is not None]
            pool = next((after for after in layers[:1] if isinstance(after, nn.MaxPool2d)), None)
            del layers[: pool is not None]
            x = norm_act(x, layer, act, pool=pool)
        return x
