"""CIFAR ResNets (20 to 110 layers) and ResNet-18 with a stem for small images.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385): section 4.2 for the CIFAR networks,
table 1 for ResNet-18. Shortcuts that change the shape are 1x1 convolutions with BatchNorm (option B there).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnvzoo.models.classifier import Classifier
from cnvzoo.models.layers import skips_initialization
from cnvzoo.models.norm_act import NormActSequential, norm_act
from cnvzoo.models.registry import register_model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, in, H, W] to [N, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = NormActSequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.conv1(x), self.norm1, self.relu)
        return norm_act(self.conv2(y), self.norm2, self.relu, residual=self.shortcut(x))


class ResNet(Classifier):
    """3x3 stem, stages of basic blocks (stride 2 from the second stage on), global average pool, linear.

    Args:
        widths: channels of each stage; the stem has as many as the first stage.
        depths: number of blocks of each stage.
        num_classes: number of logits; 0 for no last layer.
        in_chans: channels of the images.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        channels, stages = widths[0], []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(BasicBlock(channels, width, stride=2 if index and not block else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = channels
        self.fc = self._new_head(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not skips_initialization():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to the last stage's features [N, num_features, h, w]."""
        return self.stages(norm_act(self.conv(x), self.norm, self.relu))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1)
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def _set_head(self, head: nn.Module) -> None:
        self.fc = head


def _cifar_resnet(depth: int, num_classes: int, in_chans: int) -> ResNet:
    return ResNet((16, 32, 64), (depth // 6,) * 3, num_classes, in_chans)


for _depth in (20, 32, 44, 56, 110):  # 6n + 2 layers
    register_model(
        f"resnet{_depth}", summary=f"CIFAR ResNet of {_depth} layers (He et al. 2015, section 4.2)", headless=True
    )(functools.partial(_cifar_resnet, _depth))


@register_model(
    "resnet18", summary="ImageNet ResNet-18 (He et al. 2015) with a 3x3 stride-1 stem, no maxpool", headless=True
)
def _resnet18(num_classes: int, in_chans: int) -> ResNet:
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), num_classes, in_chans)
