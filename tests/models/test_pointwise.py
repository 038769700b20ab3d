"""The pointwise convolution: the values and gradients of PyTorch's own, in the layout of the layers around it."""

from __future__ import annotations

import pytest
import torch
from convolutions import plain, results
from torch import nn

from cnvzoo.models import build_model
from cnvzoo.models.layers import PointwiseConv2d

IN, OUT = 6, 5
LAYOUTS = (torch.channels_last, torch.contiguous_format)
SIZES = [(1, 1), (2, 2), (8, 8), (7, 3), (9, 8), (16, 16)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_has_the_values_of_an_ordinary_convolution(size: tuple[int, int], layout: torch.memory_format) -> None:
    layer = PointwiseConv2d(IN, OUT).double()
    found = results(layer, size, torch.float64, layout)
    expected = results(plain(layer).double(), size, torch.float64, layout)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_output_lies_in_memory_as_the_input_does(size: tuple[int, int]) -> None:
    """Or the BatchNorm behind it would copy."""
    y, of_x, _ = results(PointwiseConv2d(IN, OUT), size, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert of_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(2, 2), (9, 8)])
def test_under_autocast_it_computes_in_bfloat16_and_gives_gradients_in_float32(size: tuple[int, int]) -> None:
    layer = PointwiseConv2d(IN, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, size, torch.float32)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, exact in zip(found, results(plain(layer), size, torch.float32), strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.2)


def test_every_pointwise_layer_of_a_mobilenet_is_one() -> None:
    layers = [m for m in build_model("mobilenet_v1").modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(layers) == 13
    assert all(isinstance(layer, PointwiseConv2d) for layer in layers)
