"""What BatchNorm adds, as an int32 bias: whole accumulators.

An accelerator adds to an integer accumulator, so a bias is a whole number of them. What BatchNorm adds in a trained
model is none, and rounding it on the way out of PyTorch moves steps of the activation quantizer behind it: the deployed
model is another one. Rounded here, in the model, nothing is left to be rounded, and what is scored is what is deployed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cnvzoo.errors import ModelError

from .fake_quant import IntRange

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

    from .quant import quantizer_of

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
