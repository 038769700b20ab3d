"""Starting a quantized model from its float twin: the normalisation of the images moves into the first layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cnvzoo.data import Preprocessing
from cnvzoo.models import build_model
from cnvzoo.models.quant import start_from_float

MEAN_STD = {1: ((0.1307,), (0.3081,)), 3: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}


def images(n: int, in_chans: int) -> Tensor:
    """uint8 images [n, 32, 32, in_chans] with smooth patches, and no two channels of the same brightness."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.rand(n, in_chans, 8, 8, generator=generator) ** torch.linspace(0.5, 2, in_chans).view(-1, 1, 1)
    return (nn.functional.interpolate(patches, size=32, mode="bilinear") * 255).to(torch.uint8).permute(0, 2, 3, 1)


def trained(in_chans: int, num_classes: int = 10) -> nn.Module:
    """A float CNV whose norms have seen images, with scales and biases that are not those of initialisation."""
    torch.manual_seed(0)
    model = build_model("cnv", in_chans=in_chans, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = None  # the plain average of what they see
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for batch in Preprocessing(32, *MEAN_STD[in_chans])(images(64, in_chans)).split(16):
            model(batch)
    return model.eval()


def disagreement(in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    """Of the logits of twin and quantized model, relative to their spread."""
    twin = trained(in_chans)
    model = build_model("quant_cnv", in_chans=in_chans, w_bits=8, a_bits=8)
    start_from_float(model, twin.state_dict(), mean, std)
    model.eval()
    unseen = images(80, in_chans)[64:]
    with torch.no_grad():
        expected = twin(Preprocessing(32, *MEAN_STD[in_chans])(unseen))
        logits = model(Preprocessing(32, (0.0,) * in_chans, (1.0,) * in_chans)(unseen))
    return float((logits - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("in_chans", [1, 3])
def test_first_layer_takes_the_normalisation_up_exactly(in_chans: int) -> None:
    """Without quantization, first convolution and norm of the two models are one function of the image."""
    twin = trained(in_chans)
    model = build_model("quant_cnv", in_chans=in_chans, w_bits=8, a_bits=8).eval()
    start_from_float(model, twin.state_dict(), *MEAN_STD[in_chans])
    unseen = images(80, in_chans)[64:]
    with torch.no_grad():
        expected = Preprocessing(32, *MEAN_STD[in_chans])(unseen)
        for layer in ("features.0", "features.1"):
            expected = twin.get_submodule(layer)(expected)
        raw = nn.functional.conv2d(unseen.permute(0, 3, 1, 2) / 255, model.state_dict()["features.0.weight"])
        torch.testing.assert_close(model.get_submodule("features.1")(raw), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_eight_bits_are_close_to_float(in_chans: int) -> None:
    # Random weights amplify the rounding of eight layers more than trained ones; a wrong normalisation gives > 1.
    assert disagreement(in_chans, *MEAN_STD[in_chans]) < 0.25


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_wrong_normalisation_would_show(in_chans: int) -> None:
    mean, std = MEAN_STD[in_chans]
    assert disagreement(in_chans, (0.0,) * in_chans, std) > 0.8
    assert disagreement(in_chans, mean, (1.0,) * in_chans) > 0.8


def test_scales_fit_the_weights_and_the_norms() -> None:
    """At 4 bits, scales of initialisation would not do: those of the float weights are within 1/7 of the maximum."""
    twin = trained(3)
    model = build_model("quant_cnv", w_bits=4, a_bits=4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    start_from_float(model, twin.state_dict(), *MEAN_STD[3])
    after = model.state_dict()
    for name, tensor in twin.state_dict().items():
        if name.split(".")[:2] not in (["features", "0"], ["features", "1"]):
            assert torch.equal(after[name], tensor), name
    scales = [n for n in after if n.endswith(".scale")]
    assert len(scales) == 9 + 8
    assert all(not torch.equal(after[n], before[n]) for n in scales)
    (hidden,) = (n for n in scales if n.startswith("features.3."))
    largest = after["features.3.weight"].abs().amax((1, 2, 3)) / 7
    assert ((after[hidden].flatten() <= largest * 1.001) & (after[hidden].flatten() >= largest / 7)).all()


def test_float_state_is_left_alone() -> None:
    twin = trained(3)
    before = {n: t.clone() for n, t in twin.state_dict().items()}
    start_from_float(build_model("quant_cnv", w_bits=2, a_bits=2), twin.state_dict(), *MEAN_STD[3])
    assert all(torch.equal(t, before[n]) for n, t in twin.state_dict().items())


def test_wrong_states_name_every_tensor() -> None:
    model = build_model("quant_cnv", num_classes=100, w_bits=2, a_bits=2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = build_model("cnv", num_classes=10).state_dict()
    state["stem.weight"] = state.pop("features.3.weight")
    with pytest.raises(ValueError, match="float twin") as caught:
        start_from_float(model, state, *MEAN_STD[3])
    message = str(caught.value)
    assert "missing features.3.weight" in message
    assert "unexpected stem.weight" in message
    assert "classifier.6.weight: [10, 512], not [100, 512]" in message
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
