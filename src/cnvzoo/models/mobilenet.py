"""MobileNetV1 for small images.

Howard et al., "MobileNets", 2017 (arXiv:1704.04861), table 1, with stride 1 in the stem, so that a 32x32 image is a 2x2
map at the average pool.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnvzoo.models.classifier import Classifier
from cnvzoo.models.layers import DepthwiseConv2d, PointwiseConv2d, skips_initialization
from cnvzoo.models.norm_act import NormActSequential
from cnvzoo.models.registry import register_model

# (output channels, stride) of each depthwise-separable block
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def _norm_relu(conv: nn.Conv2d) -> nn.Module:
    return NormActSequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True))


class MobileNetV1(Classifier):
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
        self.num_features = self.head_hidden_size = channels
        self.fc = self._new_head(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not skips_initialization():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to the last block's features [N, 1024, h, w]."""
        return self.features(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1)
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def _set_head(self, head: nn.Module) -> None:
        self.fc = head


register_model("mobilenet_v1", summary="MobileNetV1 (Howard et al. 2017) with a stride-1 stem", headless=True)(
    MobileNetV1
)
