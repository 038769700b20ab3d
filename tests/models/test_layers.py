"""Convolutions with a fast training path: the values and gradients of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cnvzoo.models import build_model
from cnvzoo.models.layers import DepthwiseConv2d, FullFieldConv2d, PointwiseConv2d

LAYERS = {
    "depthwise": lambda: DepthwiseConv2d(5, 5, 3, 1, 1, groups=5, bias=False),
    "depthwise, stride 2": lambda: DepthwiseConv2d(5, 5, 3, 2, 1, groups=5, bias=False),
    "pointwise": lambda: PointwiseConv2d(6, 5, 1, bias=False),
    "full field": lambda: FullFieldConv2d(6, 5, 3, bias=False),
    # as after a BatchNorm was folded into them
    "depthwise, biased": lambda: DepthwiseConv2d(5, 5, 3, 2, 1, groups=5),
    "pointwise, biased": lambda: PointwiseConv2d(6, 5, 1),
    "full field, biased": lambda: FullFieldConv2d(6, 5, 3),
}
CASES = [
    *(("depthwise", size) for size in ((8, 8), (7, 5), (3, 3), (2, 2), (5, 1), (1, 1))),
    *(("depthwise, stride 2", size) for size in ((8, 8), (7, 5), (3, 3), (2, 2), (5, 1), (1, 1))),
    *(("pointwise", size) for size in ((1, 1), (8, 8), (7, 3), (9, 8))),
    *(("full field", size) for size in ((3, 3), (4, 3))),
    *((f"{name}, biased", (3, 3)) for name in ("depthwise", "pointwise", "full field")),
]


def plain(layer: nn.Conv2d) -> nn.Conv2d:
    """torch's layer with the same weights."""
    twin = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
        groups=layer.groups, bias=layer.bias is not None,
    )  # fmt: skip
    twin.load_state_dict(layer.state_dict(), strict=True)
    return twin


def results(
    layer: nn.Conv2d, size: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format = torch.channels_last
) -> tuple[Tensor, ...]:
    """Output, and gradients of input and parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, layer.in_channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    x = x.to(memory_format=layout).requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), upstream)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_values_and_gradients_are_those_of_torch(name: str, size: tuple[int, int], layout: torch.memory_format) -> None:
    layer = LAYERS[name]().double()
    expected = results(plain(layer).double(), size, torch.float64, layout)
    for ours, theirs in zip(results(layer, size, torch.float64, layout), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_values_are_bfloat16_and_gradients_float32(name: str) -> None:
    size = (3, 3) if name.startswith("full field") else (8, 8)
    layer = LAYERS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, size, torch.float32)
    assert [t.dtype for t in found] == [torch.bfloat16, *[torch.float32] * (len(found) - 1)]
    for ours, exact in zip(found, results(plain(layer), size, torch.float32), strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("size", [(2, 2), (9, 8)])
def test_a_pointwise_convolution_keeps_the_memory_layout(size: tuple[int, int]) -> None:
    """Else the BatchNorm after it would copy."""
    y, x_gradient, _ = results(PointwiseConv2d(6, 5, 1, bias=False), size, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x_gradient.is_contiguous(memory_format=torch.channels_last)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer = DepthwiseConv2d(5, 5, 3, 2, 1, groups=5, bias=False)
    layer(torch.randn(1, 5, 4, 4)).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    layer.weight.grad = None
    x = torch.randn(1, 5, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_models_use_these_layers() -> None:
    for name, bits in (("mobilenet_v1", {}), ("quant_mobilenet_v1", {"w_bits": 4, "a_bits": 4})):
        mobilenet = [m for m in build_model(name, **bits).modules() if isinstance(m, nn.Conv2d)][1:]
        assert all(isinstance(layer, DepthwiseConv2d) for layer in mobilenet[::2])
        assert all(isinstance(layer, PointwiseConv2d) for layer in mobilenet[1::2])
        assert [layer.stride[0] for layer in mobilenet[::2]] == [1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1]
    for name, bits in (("cnv", {}), ("quant_cnv", {"w_bits": 4, "a_bits": 4})):
        convolutions = [m for m in build_model(name, **bits).modules() if isinstance(m, nn.Conv2d)]
        assert all(isinstance(layer, FullFieldConv2d) for layer in convolutions)
