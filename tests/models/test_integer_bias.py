"""Biases as whole accumulators: which values change, how much, and which stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from brevitas.nn import QuantConv2d, QuantLinear, QuantReLU
from torch import Tensor, nn

import cnvzoo
from cnvzoo.errors import ModelError
from cnvzoo.models import build_model
from cnvzoo.models.fake_quant import IntRange
from cnvzoo.models.integers import int8_gain, quantize_bias
from cnvzoo.models.quant import quantizer_of

GAINS = {8: 1, 4: 18, 3: 42, 2: 127, 1: 127}


def trained(w_bits: int, a_bits: int) -> nn.Module:
    """A net that has seen noise, with gammas of either sign and shifts of some levels."""
    torch.manual_seed(w_bits)
    model = cnvzoo.create_model("quant_cnv", w_bits=w_bits, a_bits=a_bits)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(layer.weight).sign())
                layer.bias.normal_(0, 0.5)
        for _ in range(4):
            model(torch.randint(256, (16, 3, 32, 32)) / 255)
    return model.eval()


def biases(model: nn.Module) -> list[Tensor]:
    """What each BatchNorm adds to accumulators of weights that fill int8."""
    found = []
    layers: list[Any] = list(model.modules())
    in_scale, unit = torch.tensor(1 / 255).double(), torch.ones(())
    for layer in layers:
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            quantizer = quantizer_of(layer)
            unit = quantizer.effective_scale().double().reshape(-1) * in_scale / GAINS[quantizer.bits]
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            sigma = (layer.running_var.double() + layer.eps).sqrt()  # type: ignore[union-attr]
            slope = layer.weight.double() / sigma
            found.append((layer.bias.double() - layer.running_mean.double() * slope) / (slope * unit))  # type: ignore[union-attr]
        elif isinstance(layer, QuantReLU):
            in_scale = quantizer_of(layer).effective_scale().double()
    assert len(found) == 8
    return found


def test_gains_fill_int8() -> None:
    assert {bits: int8_gain(IntRange.of(bits, signed=True)) for bits in GAINS} == GAINS


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (2, 2), (1, 3)])
def test_biases_become_the_nearest_whole_numbers(w_bits: int, a_bits: int) -> None:
    model = trained(w_bits, a_bits)
    before = biases(model)
    cnvzoo.quantize_bias(model)
    for old, new in zip(before, biases(model), strict=True):
        tolerance = 1e-6 * old.abs().max().clamp_min(1e4)  # of float32
        assert (old - old.round()).abs().max() > 0.2
        assert (new - old.round()).abs().max() < tolerance


def test_only_beta_changes_and_a_second_call_changes_nothing() -> None:
    model = trained(4, 4)
    before = copy.deepcopy(model.state_dict())
    cnvzoo.quantize_bias(model)
    once = copy.deepcopy(model.state_dict())
    changed = {name for name, value in once.items() if not torch.equal(value, before[name])}
    norms = {name for name, layer in model.named_modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))}
    assert changed == {f"{name}.bias" for name in norms}
    cnvzoo.quantize_bias(model)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_the_bias_of_a_channel_with_a_gamma_near_0_stays_as_it_is() -> None:
    """Its bias would be infinite, or too large for int32."""
    model = trained(8, 8)
    norm: Any = model.get_submodule("features.1")
    with torch.no_grad():
        norm.weight[:2] = torch.tensor([0.0, 1e-12])
    before = norm.bias.detach().clone()
    cnvzoo.quantize_bias(model)
    assert torch.equal(norm.bias[:2], before[:2])
    assert torch.isfinite(norm.bias).all()
    assert not torch.equal(norm.bias[2:], before[2:])


@pytest.mark.parametrize("name", ["cnv", "resnet20"])
def test_a_float_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="has no quantized layer followed by a BatchNorm"):
        cnvzoo.quantize_bias(cnvzoo.create_model(name))


def change_affine(norm: Any) -> None:
    norm.weight = norm.bias = None


def change_statistics(norm: Any) -> None:
    norm.running_mean = norm.running_var = None


@pytest.mark.parametrize("change", [change_affine, change_statistics])
def test_a_norm_without_weight_or_statistics_is_named(change: Any) -> None:
    model = build_model("quant_cnv", w_bits=4, a_bits=4)
    change(model.get_submodule("features.4"))
    with pytest.raises(ModelError, match=r"^features\.4: must have a weight, a bias and running statistics$"):
        quantize_bias(model)


def test_a_quantizer_of_brevitas_is_named() -> None:
    model = build_model("quant_cnv", w_bits=4, a_bits=4)
    features: Any = model.get_submodule("features")
    features[3] = QuantConv2d(64, 64, 3, bias=False, weight_bit_width=4)
    with pytest.raises(ModelError, match=r"^features\.3: not a quantizer of cnvzoo: build it with the layers of"):
        quantize_bias(model)
