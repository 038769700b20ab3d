"""The integers of a quantized model: those of its weights, and biases as whole accumulators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from brevitas.nn import QuantConv2d, QuantLinear
from torch import Tensor, nn

from cnvzoo.errors import ModelError
from cnvzoo.models.fake_quant import IntRange
from cnvzoo.models.graph import trace
from cnvzoo.models.modes import unwrapped
from cnvzoo.models.quant import check_quantizers, quantizer_of

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

    A model that does more than to call layers has them in the order of its modules.

    Raises:
        ModelError: the model has no quantized layer, one with a quantizer of Brevitas, or a weight or scale that is not
            a finite number.
    """
    found = {}
    model = unwrapped(model)
    layers = _in_order(model)
    check_quantizers(dict(layers))
    for name, layer in layers:
        quantizer = quantizer_of(layer)
        scale = quantizer.effective_scale().detach().clone()
        if not (layer.weight.isfinite().all() and scale.isfinite().all()):
            raise ModelError(f"{name}: its weight has values that are not finite, which are no integers")
        found[name] = IntegerWeight(quantizer.integers(layer.weight).to(torch.int8), scale, quantizer.bits)
    if not found:
        raise ModelError(f"{type(model).__name__} has no quantized layer: quantize it (cnvzoo.quantize)")
    return found


def _in_order(model: nn.Module) -> list[tuple[str, QuantConv2d | QuantLinear]]:
    """The names and layers with quantized weights: in order of execution, and then those that are never called."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}
    if len(layers) < 2:
        return list(layers.items())
    try:
        order = {call.layer: position for position, call in reversed(list(enumerate(trace(model))))}
    except ModelError:
        return list(layers.items())
    return sorted(layers.items(), key=lambda item: order.get(item[1], len(order)))


@torch.no_grad()
def quantize_bias(model: nn.Module) -> None:
    """Round the shift of each BatchNorm in a quantized model to whole accumulator units, in place, by changing beta.

    An integer graph adds an int32 bias to its accumulators, in units of input scale times weight scale (Jacob et al.
    2018, arXiv:1712.05877, section 2.2), here of weights multiplied by `int8_gain`. After the rounding such a graph
    computes exactly what the model does, up to the rounding of floats. Channels whose shift exceeds `LARGEST_BIAS`
    units, or whose unit is zero, stay as they are. The bias of the last layer, where it has one, is rounded alike.

    Call it at the end of training and evaluate the model after it, as recipes with `quantize_bias: true` do.

    Raises:
        ModelError: the model has no quantized layer followed by a BatchNorm, its layers cannot be followed, a BatchNorm
            has no weight or no running statistics, or a quantizer is not one of this library.
    """
    model = unwrapped(model)
    found = False
    for layer, unit in _biased_with_units(model):
        if isinstance(layer, QuantLinear):
            assert layer.bias is not None
            _round(layer.bias, torch.zeros_like(unit), unit)
            continue
        found = True
        slope = _slope(layer)
        assert layer.running_mean is not None
        _round(layer.bias, layer.running_mean.double() * slope, unit * slope)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no quantized layer followed by a BatchNorm, whose bias could be rounded"
        )


def _slope(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _round(bias: Tensor, centre: Tensor, unit: Tensor) -> None:
    """Round biases to a centre and a whole number of units, in place."""
    biases = ((bias.double() - centre) / unit).round()
    rounded = (biases * unit + centre).to(bias.dtype)
    bias.copy_(torch.where(biases.abs() <= LARGEST_BIAS, rounded, bias))


def _biased_with_units(model: nn.Module) -> Iterator[tuple[nn.BatchNorm1d | nn.BatchNorm2d | QuantLinear, Tensor]]:
    """Each BatchNorm after a quantized layer, and a last layer with a bias, with the unit of that layer's accumulators.

    The accumulators of an average over pixels are sums of integers and have a finer unit; the unit here is that of one
    pixel, so that biases are whole numbers for any size of the images.
    """
    is_quantized = any(isinstance(layer, (QuantConv2d, QuantLinear)) for layer in model.modules())
    calls = trace(model) if is_quantized else []
    check_quantizers({call.name: call.layer for call in calls if call.layer is not None})
    pixel = torch.tensor(1 / 255, dtype=torch.float32).double()
    scales: list[Tensor] = []  # of the integers that each call gives
    for call in calls:
        layer, scale = call.layer, scales[call.inputs[0]] if call.inputs else pixel
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            quantizer = quantizer_of(layer)
            scale = quantizer.effective_scale().double().reshape(-1) * scale / int8_gain(quantizer.ints)
            if call is calls[-1] and isinstance(layer, QuantLinear) and layer.bias is not None:
                yield layer, scale
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if isinstance(calls[call.inputs[0]].layer, (QuantConv2d, QuantLinear)):
                if layer.weight is None or layer.running_var is None:
                    raise ModelError(f"{call.name}: must have a weight, a bias and running statistics")
                yield layer, scale
        elif layer is not None and hasattr(layer, "act_quant"):
            scale = quantizer_of(layer).effective_scale().double()
        scales.append(scale)
