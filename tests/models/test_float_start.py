"""Starting a quantized model from its float twin: the normalisation of images moves into the first layer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from cnvzoo.data import Preprocessing, dataset_info
from cnvzoo.models import build_model
from cnvzoo.models.quant_layers import start_from_float

MEAN, STD = dataset_info("cifar10").mean, dataset_info("cifar10").std
NORMALISED, RAW = Preprocessing(32, MEAN, STD), Preprocessing(32, (0.0,) * 3, (1.0,) * 3)


def images(n: int) -> torch.Tensor:
    """uint8 images [n, 32, 32, 3] with smooth patches, whose channels differ in brightness."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.rand(n, 3, 8, 8, generator=generator) ** torch.linspace(0.5, 2, 3).view(-1, 1, 1)
    return (nn.functional.interpolate(patches, size=32, mode="bilinear") * 255).to(torch.uint8).permute(0, 2, 3, 1)


@functools.cache
def trained() -> nn.Module:
    """A float CNV with statistics of images, and random scales and biases, in its BatchNorms."""
    torch.manual_seed(0)
    model = build_model("cnv")
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = None  # the average over all batches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for batch in NORMALISED(images(64)).split(16):
            model(batch)
    return model.eval()


@functools.cache
def started(bits: int, mean: tuple[float, ...] = MEAN) -> nn.Module:
    """A quantized CNV that started from `trained()`."""
    model = build_model("quant_cnv", w_bits=bits, a_bits=bits)
    start_from_float(model, trained().state_dict(), mean, STD)
    return model.eval()


def test_the_first_layer_contains_the_normalisation() -> None:
    """Without quantization, first convolution and BatchNorm of the two models compute the same from an image."""
    model, unseen = started(8), images(80)[64:]
    with torch.no_grad():
        expected = NORMALISED(unseen)
        for layer in ("features.0", "features.1"):
            expected = trained().get_submodule(layer)(expected)
        raw = nn.functional.conv2d(RAW(unseen), model.state_dict()["features.0.weight"])
        torch.testing.assert_close(model.get_submodule("features.1")(raw), expected, rtol=1e-4, atol=1e-4)


def test_eight_bits_are_close_to_float() -> None:
    unseen = images(80)[64:]
    with torch.no_grad():
        expected = trained()(NORMALISED(unseen))
        close, wrong = (
            float((model(RAW(unseen)) - expected).square().mean().sqrt() / expected.std())
            for model in (started(8), started(8, (0.0,) * 3))
        )
    # random weights amplify the rounding of eight layers more than trained ones do
    assert close < 0.25
    # a wrong mean is not close
    assert wrong > 0.8


def test_scales_fit_the_weights_and_the_norms() -> None:
    """At 4 bits, a scale lies between 1/49 and 1/7 of the largest weight of its channel."""
    torch.manual_seed(1)
    model, float_state = build_model("quant_cnv", w_bits=4, a_bits=4), trained().state_dict()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    float_before = {n: t.clone() for n, t in float_state.items()}
    start_from_float(model, float_state, MEAN, STD)
    after = model.state_dict()
    for name, tensor in float_state.items():
        assert torch.equal(tensor, float_before[name]), f"{name} of the float model changed"
        if name.split(".")[:2] not in (["features", "0"], ["features", "1"]):
            assert torch.equal(after[name], tensor), name
    scales = [n for n in after if n.endswith(".scale")]
    assert len(scales) == 9 + 8
    assert all(not torch.equal(after[n], before[n]) for n in scales)
    (hidden,) = (n for n in scales if n.startswith("features.3."))
    largest = after["features.3.weight"].abs().amax((1, 2, 3)) / 7
    assert ((after[hidden].flatten() <= largest * 1.001) & (after[hidden].flatten() >= largest / 7)).all()


def test_wrong_states_name_every_tensor() -> None:
    model = build_model("quant_cnv", num_classes=100, w_bits=2, a_bits=2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = build_model("cnv", num_classes=10).state_dict()
    state["stem.weight"] = state.pop("features.3.weight")
    with pytest.raises(ValueError, match="float twin") as caught:
        start_from_float(model, state, MEAN, STD)
    message = str(caught.value)
    assert "missing features.3.weight" in message
    assert "unexpected stem.weight" in message
    assert "classifier.6.weight: [10, 512], not [100, 512]" in message
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
