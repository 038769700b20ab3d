"""MobileNetV1 for small images.

Howard et al., "MobileNets", 2017 (arXiv:1704.04861), table 1, with stride 1 in the stem, so that a 32x32 image is a 2x2
map at the average pool.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnvzoo.models.layers import DepthwiseConv2d, PointwiseConv2d, skips_initialization
from cnvzoo.models.norm_act import NormActSequential
from cnvzoo.models.registry import register_model

# (output channels, stride) of each depthwise-separable block
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def _norm_relu(conv: nn.Conv2d) -> nn.Module:
    return NormActSequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True))


class MobileNetV1(nn.Module):
    """Stem, 13 depthwise-separable blocks, global average pool, linear.

    Images [N, in_chans, H, W] to logits [N, num_classes].
    """

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        channels = 32
        layers = [_norm_relu(nn.Conv2d(in_chans, channels, 3, padding=1, bias=False))]
        for out_channels, stride in _BLOCKS:
            layers.append(_norm_relu(DepthwiseConv2d(channels, stride)))
            layers.append(_norm_relu(PointwiseConv2d(channels, out_channels)))
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not skips_initialization():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.fc(torch.flatten(x, 1))


register_model("mobilenet_v1", summary="MobileNetV1 (Howard et al. 2017) with a stride-1 stem")(MobileNetV1)
