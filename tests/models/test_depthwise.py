"""The depthwise convolution: the values and gradients of PyTorch's own, by whatever way they come."""

from __future__ import annotations

import pytest
import torch
from convolutions import plain, results
from torch import nn

from cnvzoo.models import build_model
from cnvzoo.models.layers import DepthwiseConv2d

CHANNELS = 5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (6, 3), (3, 3), (2, 2), (1, 2), (5, 1), (1, 1)])
def test_has_the_gradients_of_an_ordinary_convolution(stride: int, size: tuple[int, int]) -> None:
    layer = DepthwiseConv2d(CHANNELS, stride).double()
    for ours, theirs in zip(
        results(layer, size, torch.float64), results(plain(layer).double(), size, torch.float64), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_under_autocast_it_computes_in_bfloat16_and_gives_gradients_in_float32(stride: int) -> None:
    layer = DepthwiseConv2d(CHANNELS, stride)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, (8, 8), torch.float32)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, exact in zip(found, results(plain(layer), (8, 8), torch.float32), strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.1)


def test_frozen_filters_and_images_get_no_gradient() -> None:
    layer = DepthwiseConv2d(CHANNELS, 2)
    layer(torch.randn(1, CHANNELS, 4, 4)).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    layer.weight.grad = None
    x = torch.randn(1, CHANNELS, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_every_depthwise_layer_of_a_mobilenet_is_one() -> None:
    layers = [m for m in build_model("mobilenet_v1").modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(layers) == 13
    assert all(isinstance(layer, DepthwiseConv2d) for layer in layers)
    assert [layer.stride[0] for layer in layers] == [1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1]
