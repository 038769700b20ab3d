"""The quantized layers: Brevitas' own, with the quantizers of this library injected and plain tensors between them.

Every quantizer holds its scale as a parameter from the start. So a fresh model has all of its state before it
ever ran, no statistics are gathered during the first steps, and nothing recompiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from brevitas.inject import ExtendedInjector
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn

from cnvzoo.errors import ModelError
from cnvzoo.models.fake_quant import IntRange, fake_quantize, least_squares_scale
from cnvzoo.models.layers import FullFieldMatmul, init_weight, skips_initialization
from cnvzoo.models.norm_act import QuantizedActivation

INPUT_SCALE = 1 / 255
_SCALE_FLOOR = 1e-8
_GRADIENT_LIMIT = 0.02  # of a scale's gradient, in units of the scale
_NORMAL_SAMPLES = 1 << 14


class _PositiveScale(torch.autograd.Function):
    """A scale, at least the floor; its gradient times `gain`, and at most a fiftieth of the scale itself.

    A step that takes a scale through zero kills its channel: all weights round to the ends, BatchNorm sees a constant,
    the ReLU behind it passes no gradient on. With that limit it cannot happen up to lr 0.1 at momentum 0.9: the worst
    sequence of gradients makes the scale a damped oscillator, critical at lr * limit = (1 - momentum)^2 / 4.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        ctx.save_for_backward(scale)
        return scale.clamp_min(_SCALE_FLOOR)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        limit = scale.abs() * _GRADIENT_LIMIT
        return (grads[0] * ctx.gain).clamp(-limit, limit), None


class IntQuantizer(nn.Module):
    """What Brevitas calls a `tensor_quant`: x to (fake-quantized x, scale, zero point 0, bit width).

    Args:
        bits: bit width, 1 to 8.
        signed: symmetric around 0, for weights; else from 0 up, for activations.
        scale_shape: `()` for one scale, `(channels, 1, ...)` for one per output channel.
        learned: whether the scale is a parameter; else it is a constant that is not part of the state.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        scale_shape: tuple[int, ...] = (),
        scale: float = 1.0,
        learned: bool = True,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.signed = signed
        self.ints = IntRange.of(bits, signed=signed)
        self.learned = learned
        value = torch.full(scale_shape, scale)
        if learned:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value, persistent=False)
        self.register_buffer("zero_point", torch.zeros(()), persistent=False)
        self.register_buffer("bit_width", torch.tensor(float(bits)), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = self.positive_scale(x)
        # autocast would make the same of weights, in a pass of its own
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return fake_quantize(x, scale, self.ints, dtype), scale, self.zero_point, self.bit_width  # type: ignore[return-value]

    def effective_scale(self) -> Tensor:
        """The scale that values are divided by, exactly: what was learned, or the floor where that is below it."""
        return self.scale.clamp_min(_SCALE_FLOOR) if self.learned else self.scale

    def positive_scale(self, x: Tensor) -> Tensor:
        """The effective scale; its gradient is that of LSQ, section 2.2: divided by sqrt(values * levels).

        `values` are those that share one scale: of the weights, or of the activations of one image. Without the
        division a scale's steps are larger than a weight's by orders of magnitude.
        """
        if not self.learned:
            return self.scale
        values = x.numel() // (self.scale.numel() if self.signed else x.shape[0])
        return _PositiveScale.apply(self.scale, 1 / math.sqrt(values * self.ints.high))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the scale to the one of least squared error for x (one row of values for each scale)."""
        rows = x.reshape(max(self.scale.numel(), 1), -1)
        self.scale.copy_(least_squares_scale(rows, self.ints).reshape(self.scale.shape))


def _injector(quantizer: IntQuantizer, proxy: type, *, signed: bool) -> type:
    """Brevitas' way to be told of a quantizer: a class whose attributes are the parts."""
    return type(
        "Quant",
        (ExtendedInjector,),
        {
            "proxy_class": proxy,
            "tensor_quant": quantizer,
            "signed": signed,
            "narrow_range": signed,
            "quant_type": "int",
            "float_to_int_impl_type": "ROUND",  # in the letters of QONNX, whose older readers know no others
        },
    )


class _ClampedReLU(nn.ReLU):
    """ReLU in front of an unsigned quantizer, which clamps at zero itself: nothing to compute but in export."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if torch.onnx.is_in_onnx_export() else input


class _ClampedQuantReLU(QuantReLU, QuantizedActivation):
    """QuantReLU on a `_ClampedReLU`; handed over here because Brevitas makes the activation anew at every load."""

    def __init__(self, act_quant: type) -> None:
        QuantNonLinearActLayer.__init__(
            self,
            act_impl=_ClampedReLU,
            passthrough_act=True,
            input_quant=None,
            act_quant=act_quant,  # type: ignore[arg-type]
            return_quant_tensor=False,
        )

    @property
    def activation_quantizer(self) -> IntQuantizer:  # type: ignore[override]
        return quantizer_of(self)


class _QuantConv(FullFieldMatmul, QuantConv2d):
    """Brevitas' convolution, trained as fast as the float one."""


class QuantLayers:
    """Layers of `cnvzoo.models.cnv.CNV` with weights of `w_bits` and activations of `a_bits`.

    Hidden weights have one scale per output channel, which the BatchNorm behind them absorbs in a deployed
    graph; the last layer has one scale in all, so that its integer outputs rank the classes.
    """

    def __init__(self, w_bits: int, a_bits: int, first_w_bits: int) -> None:
        self.w_bits, self.a_bits, self.first_w_bits = w_bits, a_bits, first_w_bits

    def input(self) -> nn.Module:
        """The 8-bit image: values k/255 pass unchanged (to rounding), and the exported graph knows their scale."""
        quantizer = IntQuantizer(8, signed=False, scale=INPUT_SCALE, learned=False)
        layer = QuantIdentity(act_quant=_injector(quantizer, ActQuantProxyFromInjector, signed=False))
        return _plain_tensors(layer, layer.act_quant)

    def conv(self, in_channels: int, out_channels: int, *, first: bool) -> nn.Module:
        bits = self.first_w_bits if first else self.w_bits
        quantizer = IntQuantizer(bits, signed=True, scale_shape=(out_channels, 1, 1, 1))
        return _fit_weights(
            _QuantConv(in_channels, out_channels, 3, bias=False, weight_quant=_weights(quantizer)), quantizer
        )

    def linear(self, in_features: int, out_features: int, *, last: bool) -> nn.Module:
        quantizer = IntQuantizer(self.w_bits, signed=True, scale_shape=() if last else (out_features, 1))
        return _fit_weights(
            QuantLinear(in_features, out_features, bias=False, weight_quant=_weights(quantizer)), quantizer
        )

    def relu(self) -> nn.Module:
        quantizer = IntQuantizer(self.a_bits, signed=False)
        layer = _ClampedQuantReLU(_injector(quantizer, ActQuantProxyFromInjector, signed=False))
        if not skips_initialization():
            quantizer.fit(_relu_of_normal(torch.ones(1), torch.zeros(1)))
        return _plain_tensors(layer, layer.act_quant)


def _weights(quantizer: IntQuantizer) -> type:
    return _injector(quantizer, WeightQuantProxyFromInjector, signed=True)


def _fit_weights(layer: QuantConv2d | QuantLinear, quantizer: IntQuantizer) -> nn.Module:
    if not skips_initialization():
        init_weight(layer.weight)
        quantizer.fit(layer.weight)
    return _plain_tensors(layer, layer.weight_quant)


def _plain_tensors(layer: nn.Module, proxy: Any) -> nn.Module:
    """Have the quantizer behind `proxy` give plain tensors: QuantTensors break torch.compile and export."""
    proxy.skip_create_quant_tensor = True
    return layer


def _relu_of_normal(gamma: Tensor, beta: Tensor) -> Tensor:
    """What a ReLU makes of a BatchNorm's output: quantiles of relu(N(beta, gamma^2)), [channels, samples]."""
    grid = (torch.arange(_NORMAL_SAMPLES, device=gamma.device) + 0.5) / _NORMAL_SAMPLES
    z = math.sqrt(2) * torch.erfinv(2 * grid - 1)
    return torch.relu(beta[:, None] + gamma.abs()[:, None] * z)


@torch.no_grad()
def start_from_float(
    model: nn.Module, state: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Give a quantized model the weights of its float twin, in place, and scales that fit them.

    The float model sees normalised images, the quantized one the images themselves in [0, 1]: the first
    convolution and its BatchNorm take the difference up, exactly, since no layer pads. Activation scales follow
    from the BatchNorm in front of each, so that no images are needed.

    Args:
        model: a fresh quantized CNV.
        state: the float CNV's state_dict, same classes and channels.
        mean, std: of the float model's preprocessing, one per channel, in [0, 1] units.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape; all are named.
    """
    own = model.state_dict()
    scales = {name for name in own if name.endswith(".scale")}
    wrong = [f"missing {n}" for n in own if n not in scales and n not in state]
    wrong += [f"unexpected {n}" for n in state if n not in own]
    wrong += [
        f"{n}: {list(t.shape)}, not {list(own[n].shape)}"
        for n, t in state.items()
        if n in own and t.shape != own[n].shape
    ]
    if wrong:
        raise ValueError("these float weights are not of the model's float twin: " + "; ".join(wrong))
    model.load_state_dict({**own, **state}, strict=True)

    layers = [
        m
        for m in model.modules()
        if isinstance(m, (QuantConv2d, QuantLinear, nn.BatchNorm1d, nn.BatchNorm2d, QuantReLU))
    ]
    first, norm = layers[0], layers[1]
    assert isinstance(first, QuantConv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    spread = torch.tensor(std, device=first.weight.device).view(1, -1, 1, 1)
    center = torch.tensor(mean, device=first.weight.device).view(1, -1, 1, 1)
    first.weight.div_(spread)
    norm.running_mean.add_((first.weight * center).sum((1, 2, 3)))

    for before, layer in zip([None, *layers], layers, strict=False):
        if isinstance(layer, QuantReLU):
            assert isinstance(before, (nn.BatchNorm1d, nn.BatchNorm2d))
            quantizer_of(layer).fit(_relu_of_normal(before.weight, before.bias))
        elif isinstance(layer, (QuantConv2d, QuantLinear)):
            quantizer_of(layer).fit(layer.weight)


def quantizer_of(layer: nn.Module) -> IntQuantizer:
    """The weight quantizer of a quantized convolution or linear layer, the activation quantizer of another layer."""
    brevitas: Any = layer
    if isinstance(layer, (QuantConv2d, QuantLinear)):
        return brevitas.weight_quant.tensor_quant
    return brevitas.act_quant.fused_activation_quant_proxy.tensor_quant


_INT8_HIGH = 127
LARGEST_BIAS = 1 << 30  # leaves room in int32 for an accumulator beside it


def int8_gain(ints: IntRange) -> int:
    """The largest whole number that weights of this range can be multiplied by inside int8.

    Weights that are multiplied by it leave the net as it is, but make the unit of an int32 bias as much finer.
    """
    return _INT8_HIGH // ints.high


@torch.no_grad()
def quantize_bias(model: nn.Module) -> None:
    """Round what each BatchNorm of a quantized model adds to whole accumulators, in place, by moving its beta.

    In the terms of Jacob et al. 2018 (section 2.2), where a bias is an int32 number of input scale times weight scale;
    here of weights that are scaled up to fill int8. Channels whose input is multiplied by zero stay as they are.

    Call it at the end of training and score the model after it: its integer graph then computes, but for the rounding
    of floats, exactly what the model does. Recipes have `quantize_bias: true`.

    Raises:
        ModelError: a model without quantized layers.
    """
    found = False
    for norm, unit in _norms_with_units(model):
        found = True
        slope = _slope(norm)
        assert norm.running_mean is not None
        centre = norm.running_mean.double() * slope
        unit = unit * slope
        biases = ((norm.bias.double() - centre) / unit).round()
        rounded = (biases * unit + centre).to(norm.bias.dtype)
        norm.bias.copy_(torch.where(biases.abs() <= LARGEST_BIAS, rounded, norm.bias))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no quantized layers with a BatchNorm, whose bias could be rounded"
        )


def _slope(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _norms_with_units(model: nn.Module) -> Iterator[tuple[nn.BatchNorm1d | nn.BatchNorm2d, Tensor]]:
    """Every BatchNorm behind a quantized layer, and what one accumulator of weights that fill int8 stands for."""
    from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU

    in_scale, unit = torch.ones(()), None
    for layer in model.modules():
        if isinstance(layer, (QuantIdentity, QuantReLU)):
            in_scale = quantizer_of(layer).effective_scale().double()
        elif isinstance(layer, (QuantConv2d, QuantLinear)):
            quantizer = quantizer_of(layer)
            unit = quantizer.effective_scale().double().reshape(-1) * in_scale / int8_gain(quantizer.ints)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and unit is not None:
            yield layer, unit
            unit = None
