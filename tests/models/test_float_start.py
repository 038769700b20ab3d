"""Starting from a float model: a quantized one from its twin, whose normalisation of images moves into the first layer,
and a deep ResNet from a shallower one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.data import Dataset, Preprocessing, dataset_info, load_dataset
from cnvzoo.models import Classifier, build_model, register_model, unregister_model
from cnvzoo.models.layers import FloatLayers
from cnvzoo.models.quant import quantizer_of
from cnvzoo.models.quant_layers import QuantLayers, start_from_float
from cnvzoo.models.resnet import ResNet, start_from_shallower
from cnvzoo.zoo import quantize

MEAN, STD = dataset_info("cifar10").mean, dataset_info("cifar10").std
NORMALISED, RAW = Preprocessing(32, MEAN, STD), Preprocessing(32, (0.0,) * 3, (1.0,) * 3)


def images(n: int) -> torch.Tensor:
    """uint8 images [n, 32, 32, 3] with smooth patches, whose channels differ in brightness."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.rand(n, 3, 8, 8, generator=generator) ** torch.linspace(0.5, 2, 3).view(-1, 1, 1)
    return (nn.functional.interpolate(patches, size=32, mode="bilinear") * 255).to(torch.uint8).permute(0, 2, 3, 1)


@functools.cache
def trained(name: str = "cnv") -> nn.Module:
    """A float model with statistics of images, and random scales and biases, in its BatchNorms."""
    torch.manual_seed(0)
    model = build_model(name)
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


def test_a_first_layer_that_pads_contains_the_normalisation_but_at_the_border() -> None:
    """The float model pads with the mean colour, and the quantized one with black."""
    twin, model, unseen = trained("resnet20"), build_model("quant_resnet20", w_bits=8, a_bits=8), images(80)[64:]
    start_from_float(model, twin.state_dict(), MEAN, STD)
    with torch.no_grad():
        expected = twin.get_submodule("norm")(twin.get_submodule("conv")(NORMALISED(unseen)))
        raw = nn.functional.conv2d(RAW(unseen), model.state_dict()["conv.weight"], padding=1)
        found = model.eval().get_submodule("norm")(raw)
        close = (found - expected).abs() < 1e-4 + 1e-4 * expected.abs()
        assert close[:, :, 1:-1, 1:-1].all()
        border = torch.ones(32, 32, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        assert close[:, :, border].double().mean() < 0.05
        # padded with the mean colour, the quantized model's is the float one's at the border too
        mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        padded = nn.functional.pad(RAW(unseen) - mean, (1, 1, 1, 1)) + mean
        same = model.get_submodule("norm")(nn.functional.conv2d(padded, model.state_dict()["conv.weight"]))
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def of_cifar10(real_data: Callable[[str], Path]) -> tuple[Classifier, Dataset]:
    """The published ResNet-20, and real images."""
    real_data("cifar10")
    return load_checkpoint("resnet20.cifar10")[0], load_dataset("cifar10")


@pytest.mark.parametrize(("bits", "least"), [(8, 98.0), (4, 92.0)])
def test_a_residual_network_keeps_its_classes(of_cifar10: tuple[Classifier, Dataset], bits: int, least: float) -> None:
    """On 500 training images; on 2,000 the accuracy is 99.65 % in float, 99.35 % at 8 bits and 96.0 % at 4 bits."""
    source, data = of_cifar10
    pixels = data.train_images[:500]
    quantized = quantize(source, w_bits=bits, a_bits=bits).eval()
    assert quantized.preprocessing is not None
    assert (quantized.preprocessing.mean, quantized.preprocessing.std) == (RAW.mean, RAW.std)
    with torch.no_grad():
        expected, found = source(NORMALISED(pixels)).argmax(1), quantized(RAW(pixels)).argmax(1)
    assert 100 * (found == expected).double().mean() >= least


@torch.no_grad()
def test_scales_of_blocks_fit_real_activations(of_cifar10: tuple[Classifier, Dataset]) -> None:
    """They are fitted to what the BatchNorms say, without images: rounding real activations costs little."""
    source, data = of_cifar10
    quantized = quantize(source, w_bits=4, a_bits=4)
    seen: dict[str, list[torch.Tensor]] = {}
    fitted = {
        name: quantizer_of(layer)
        for name, layer in quantized.named_modules()
        if name.startswith("stages.") and hasattr(layer, "act_quant")
    }
    handles = []
    for name in fitted:

        def keep(_layer: nn.Module, _inputs: object, output: Any, name: str = name) -> None:
            seen.setdefault(name, []).append(output.clone())

        handles.append(source.get_submodule(name).register_forward_hook(keep))
    source(NORMALISED(data.train_images[:64]))
    for handle in handles:
        handle.remove()
    assert len(fitted) == 3 + 9 + 9
    for name, quantizer in fitted.items():
        values = torch.cat([output.flatten() for output in seen[name]])
        error = (quantizer.integers(values) * quantizer.scale - values).square().mean() / values.square().mean()
        assert error < 0.04, name


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


def test_the_quantized_twin_has_the_options_of_the_model() -> None:
    @register_model("slim", summary="for a test")
    def build(num_classes: int, in_chans: int, width: int = 4) -> ResNet:
        return ResNet((width,), (1,), num_classes, in_chans, FloatLayers())

    @register_model("quant_slim", summary="for a test", quantized=True, float_twin="slim")
    def build_quantized(num_classes: int, in_chans: int, w_bits: int, a_bits: int, width: int = 4) -> ResNet:
        return ResNet((width,), (1,), num_classes, in_chans, QuantLayers(w_bits, a_bits, 8))

    try:
        source = build_model("slim", width=8)
        quantized = quantize(source, w_bits=4, a_bits=4, dataset="cifar10")
        assert quantized.arguments["width"] == 8
        assert torch.equal(quantized.get_parameter("fc.weight"), source.get_parameter("fc.weight"))
    finally:
        unregister_model("slim")
        unregister_model("quant_slim")


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


def deeper(depths: tuple[int, int, int] = (5, 5, 5)) -> ResNet:
    torch.manual_seed(1)
    return ResNet((16, 32, 64), depths, 10, 3, FloatLayers())


@pytest.mark.parametrize("depths", [(3, 3, 3), (5, 5, 5), (3, 4, 9)])
def test_a_deeper_resnet_starts_with_the_logits_of_the_shallower_one(depths: tuple[int, int, int]) -> None:
    shallow, model = trained("resnet20"), deeper(depths)
    start_from_shallower(model, shallow.state_dict())
    unseen = NORMALISED(images(4))
    with torch.no_grad():
        assert torch.equal(model.eval()(unseen), shallow(unseen))


def test_blocks_of_a_shallower_net_are_spread_and_the_others_begin_to_learn(uncompiled: None) -> None:
    shallow, model = trained("resnet20").state_dict(), deeper()
    start_from_shallower(model, shallow)
    for old, new in enumerate((0, 1, 3)):  # 0, 5 / 3 and 10 / 3
        key = "conv1.weight"
        assert torch.equal(model.state_dict()[f"stages.2.{new}.{key}"], shallow[f"stages.2.{old}.{key}"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.get_parameter("stages.2.4.conv1.weight").detach().clone()
    for step in range(2):
        assert bool((model.get_parameter("stages.2.4.norm2.weight") == 0).all()) == (step == 0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(NORMALISED(images(20))), torch.arange(20) % 10).backward()
        optimizer.step()
    assert not torch.equal(model.get_parameter("stages.2.4.conv1.weight"), before)


@pytest.mark.parametrize(
    ("other", "tensor"),
    [
        (ResNet((16, 32, 64), (3, 6, 3), 10, 3, FloatLayers()), "stages.1.1.conv1.weight"),
        (ResNet((16, 32, 64), (3, 3, 3), 7, 3, FloatLayers()), "fc.weight"),
        (ResNet((8, 32, 64), (3, 3, 3), 10, 3, FloatLayers()), "conv.weight"),
        (build_model("cnv"), "features.0.weight"),
    ],
    ids=["deeper", "classes", "widths", "other net"],
)
def test_the_weights_of_a_net_that_is_not_shallower_are_refused(other: nn.Module, tensor: str) -> None:
    model = deeper()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{tensor}: not a tensor of a shallower net of these widths, classes and"):
        start_from_shallower(model, other.state_dict())
    incomplete = {name: value for name, value in trained("resnet20").state_dict().items() if name != "fc.bias"}
    with pytest.raises(ValueError, match=r"^fc\.bias: missing in the weights of the shallower net$"):
        start_from_shallower(model, incomplete)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
