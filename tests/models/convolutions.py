"""What a convolution of ours and PyTorch's own make of the same images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def plain(layer: nn.Conv2d) -> nn.Conv2d:
    """PyTorch's layer with the same weights."""
    twin = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
        groups=layer.groups, bias=False,
    )  # fmt: skip
    twin.load_state_dict(layer.state_dict(), strict=True)
    return twin


def results(
    layer: nn.Conv2d, size: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format = torch.channels_last
) -> tuple[Tensor, ...]:
    """Output, and gradients of images and filters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, layer.in_channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    x = x.to(memory_format=layout).requires_grad_()
    y = layer(x)
    wanted = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    of_x, of_weight = torch.autograd.grad(y, (x, *layer.parameters()), wanted)
    return y, of_x, of_weight
