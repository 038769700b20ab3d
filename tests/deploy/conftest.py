"""Quantized networks for the deployment tests: random weights, and BatchNorms with every kind of gamma."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import cnvzoo
from cnvzoo.models.classifier import PooledClassifier
from cnvzoo.models.layers import Layers
from cnvzoo.models.norm_act import NormActSequential
from cnvzoo.models.quant_layers import QuantLayers
from cnvzoo.models.resnet import ResNet


@torch.no_grad()
def with_statistics(model: nn.Module, size: int) -> nn.Module:
    """The model in eval mode, with statistics of noise, and negative, tiny and zero gammas."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.copy_(torch.randn_like(layer.weight) / 2 + 0.7)
            layer.bias.normal_(0, 0.5)
            layer.weight[:3] = torch.tensor([0.0, 1e-9, -0.3])
            layer.momentum = None  # the mean over all batches
    for _ in range(2):
        model(torch.randint(256, (8, 3, size, size)) / 255)
    return model.eval()


class Separable(PooledClassifier):
    """A convolution, and a depthwise-separable one with stride 2, as in MobileNet."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        self.input = layers.input()
        parts = (layers.conv(3, 6, 3, padding=1, first=True), layers.depthwise(6, 2), layers.pointwise(6, 8))
        self.features = NormActSequential()
        for part in parts:
            self.features.extend([part, nn.BatchNorm2d(len(part.get_parameter("weight"))), layers.relu()])
        self.num_features = self.head_hidden_size = 8
        self.fc = self.new_classifier(5)
        layers.finish(self)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(self.input(x))


@pytest.fixture(scope="session")
def small_net() -> Callable[..., nn.Module]:
    """`small_net(kind, w_bits, a_bits)`: a new model of 5 classes for 8x8 images.

    The kinds are `residual`, a ResNet of 4 and 6 channels with two blocks in each of two stages, and `separable`.
    """

    def make(kind: str, w_bits: int, a_bits: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(w_bits * 10 + a_bits)
            layers = QuantLayers(w_bits, a_bits, 8)
            model = Separable(layers) if kind == "separable" else ResNet((4, 6), (2, 2), 5, 3, layers)
            return with_statistics(model, 8)

    return make


@pytest.fixture(scope="session")
def registered_net() -> Callable[..., nn.Module]:
    """`registered_net(name, bits)`: a model of the registry with statistics of noise."""
    made: dict[tuple[str, int], nn.Module] = {}

    def make(name: str, bits: int) -> nn.Module:
        if (name, bits) not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(bits)
                made[name, bits] = with_statistics(cnvzoo.create_model(name, w_bits=bits, a_bits=bits), 32)
        return made[name, bits]

    return make


@pytest.fixture(autouse=True)
def eager(uncompiled: None) -> None:
    """Compile no loops: it takes longer than the few batches of these tests, and gives the same values."""


@pytest.fixture(scope="session")
def make_net() -> Callable[..., nn.Module]:
    """`make_net(w_bits, a_bits)`: a `quant_cnv` with statistics of noise, and negative, tiny and zero gammas."""
    made: dict[tuple[int, ...], nn.Module] = {}

    def make(w_bits: int, a_bits: int, in_chans: int = 3) -> nn.Module:
        key = (w_bits, a_bits, in_chans)
        if key in made:
            return made[key]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(w_bits * 10 + a_bits)
            model = cnvzoo.create_model("quant_cnv", w_bits=w_bits, a_bits=a_bits, in_chans=in_chans)
            for layer in model.modules():
                if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    layer.weight.copy_(torch.randn_like(layer.weight) + 0.5)
                    layer.bias.normal_(0, 0.5)
                    layer.weight[:3] = torch.tensor([0.0, 1e-9, -0.3])
                    layer.momentum = None  # the mean over all batches
            for _ in range(3):
                model(torch.randint(256, (32, in_chans, 32, 32)) / 255)
        made[key] = model.eval()
        return made[key]

    return make


@pytest.fixture(scope="session")
def noise() -> Callable[..., torch.Tensor]:
    """`noise(count, in_chans)`: uint8 images [count, in_chans, 32, 32], the first black, the second white."""

    def draw(count: int, in_chans: int = 3) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(256, (count, in_chans, 32, 32), generator=generator, dtype=torch.uint8)
        images[0], images[1] = 0, 255
        return images

    return draw
