"""Quantized networks for the deployment tests: random weights, and BatchNorms with every kind of gamma."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import cnvzoo


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
