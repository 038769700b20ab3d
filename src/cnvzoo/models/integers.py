"""The integers of a quantized model: those of its weights, and biases as whole accumulators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from torch import Tensor, nn

from cnvzoo.errors import ModelError
from cnvzoo.models.fake_quant import IntRange
from cnvzoo.models.quant import quantizer_of

_INT8_HIGH = 127
LARGEST_BIAS = 1 << 30  # int32 has room for a bias of this size plus an accumulator


def int8_gain(ints: IntRange) -> int:
    """The largest whole number by which weights of this range can be multiplied within int8.

    Deployed weights are multiplied by it, with the scale divided by it: this makes the unit of the int32 bias finer.
    """
    return _INT8_HIGH // ints.high


class IntegerWeight(NamedTuple):
    """The weight of a quantized layer: `values * scale` is what the layer computes with.

    Attributes:
        values: int8, in the shape of the weight: [out, in, height, width], or [out, in] of a linear layer. From
            -(2^(bits-1) - 1) to 2^(bits-1) - 1; of 1 bit, -1 and 1.
        scale: float32, positive: [out, 1, 1, 1] or [out, 1], one per output channel, or [], one in all.
        bits: bit width, 1 to 8.
    """

    values: Tensor
    scale: Tensor
    bits: int


@torch.no_grad()
def integer_weights(model: nn.Module) -> dict[str, IntegerWeight]:
    """The integer weights of a quantized model: copies, on its device, by name of the layer, in order of execution.

    Raises:
        ModelError: the model has no quantized layer, or a weight or scale is not a finite number.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (QuantConv2d, QuantLinear)):
            continue
        quantizer = quantizer_of(layer)
        scale = quantizer.effective_scale().detach().clone()
        if not (layer.weight.isfinite().all() and scale.isfinite().all()):
            raise ModelError(f"{name}: its weight has values that are not finite, which are no integers")
        found[name] = IntegerWeight(quantizer.integers(layer.weight).to(torch.int8), scale, quantizer.bits)
    if not found:
        raise ModelError(f"{type(model).__name__} has no quantized layer: quantize it (cnvzoo.quantize)")
    return found


@torch.no_grad()
def quantize_bias(model: nn.Module) -> None:
    """Round the shift of each BatchNorm in a quantized model to whole accumulator units, in place, by changing beta.

    An integer graph adds an int32 bias to its accumulators, in units of input scale times weight scale (Jacob et al.
    2018, arXiv:1712.05877, section 2.2), here of weights multiplied by `int8_gain`. After the rounding such a graph
    computes exactly what the model does, up to the rounding of floats. Channels whose shift exceeds `LARGEST_BIAS`
    units, or whose unit is zero, stay as they are.

    Call it at the end of training and evaluate the model after it, as recipes with `quantize_bias: true` do.

    Raises:
        ModelError: the model has no quantized layer followed by a BatchNorm.
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
            f"{type(model).__name__} has no quantized layer followed by a BatchNorm, whose bias could be rounded"
        )


def _slope(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _norms_with_units(model: nn.Module) -> Iterator[tuple[nn.BatchNorm1d | nn.BatchNorm2d, Tensor]]:
    """Each BatchNorm after a quantized layer, and the value of one unit of that layer's accumulators."""
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
