"""CNV, the VGG-like network of FINN: one graph, which the float and the quantized model fill with their own layers.

Umuroglu et al., "FINN", 2017 (arXiv:1612.07119), section 5: six 3x3 convolutions without padding, two max pools and
three linear layers, with BatchNorm after every layer but the last. No layer has a bias.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from cnvzoo.models.classifier import Classifier, check_bits
from cnvzoo.models.layers import FullFieldConv2d, init_weight, skips_initialization
from cnvzoo.models.norm_act import NormActSequential
from cnvzoo.models.registry import register_model

_CONVS = (64, 64, "pool", 128, 128, "pool", 256, 256)
_HIDDEN = (512, 512)
_NORM_EPS = 1e-4


class Layers(Protocol):
    """A factory of the layers of a CNV, all without bias."""

    def input(self) -> nn.Module: ...
    def conv(self, in_channels: int, out_channels: int, *, first: bool) -> nn.Module: ...
    def linear(self, in_features: int, out_features: int, *, last: bool) -> nn.Module: ...
    def relu(self) -> nn.Module: ...


class FloatLayers:
    """Plain torch layers."""

    def input(self) -> nn.Module:
        return nn.Identity()

    def conv(self, in_channels: int, out_channels: int, *, first: bool) -> nn.Module:
        layer = FullFieldConv2d(in_channels, out_channels, 3, bias=False)
        if not skips_initialization():
            init_weight(layer.weight)
        return layer

    def linear(self, in_features: int, out_features: int, *, last: bool) -> nn.Module:
        layer = nn.Linear(in_features, out_features, bias=False)
        if not skips_initialization():
            init_weight(layer.weight)
        return layer

    def relu(self) -> nn.Module:
        return nn.ReLU(inplace=True)


class CNV(Classifier):
    """Images [N, in_chans, 32, 32] to logits [N, num_classes].

    The features are those of the convolutions, [N, 256, 1, 1]. The head is the three linear layers, the last of which
    takes [N, 512].

    Args:
        num_classes: number of logits; 0 for no last layer.
        in_chans: channels of the images.
        layers: factory of the layers: `FloatLayers()`, or `QuantLayers` of `cnvzoo.models.quant`.
    """

    def __init__(self, num_classes: int, in_chans: int, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.input = layers.input()
        self.features = NormActSequential()
        channels = in_chans
        for index, step in enumerate(_CONVS):
            if isinstance(step, str):
                self.features.append(nn.MaxPool2d(2))
                continue
            self.features.append(layers.conv(channels, step, first=index == 0))
            self.features.append(nn.BatchNorm2d(step, eps=_NORM_EPS))
            self.features.append(layers.relu())
            channels = step
        self.num_features = channels
        self.classifier = nn.Sequential()
        for width in _HIDDEN:
            self.classifier.append(layers.linear(channels, width, last=False))
            self.classifier.append(nn.BatchNorm1d(width, eps=_NORM_EPS))
            self.classifier.append(layers.relu())
            channels = width
        self.head_hidden_size = channels
        self.classifier.append(self._new_head(num_classes))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, 32, 32] to features [N, 256, 1, 1]."""
        return self.features(self.input(x))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [N, 256, 1, 1] to logits [N, num_classes], or to what the last layer takes, [N, 512]."""
        layers = self.classifier[:-1] if pre_logits else self.classifier
        return layers(torch.flatten(features, 1))

    def get_classifier(self) -> nn.Module:
        return self.classifier[-1]

    def _new_head(self, num_classes: int) -> nn.Module:
        return self.layers.linear(self.head_hidden_size, num_classes, last=True) if num_classes else nn.Identity()

    def _set_head(self, head: nn.Module) -> None:
        self.classifier[-1] = head


@register_model("cnv", summary="CNV (Umuroglu et al. 2017), float", input_size=32, headless=True)
def _cnv(num_classes: int, in_chans: int) -> CNV:
    return CNV(num_classes, in_chans, FloatLayers())


@register_model(
    "quant_cnv",
    summary="CNV with weights of w_bits and activations of a_bits (1 to 8)",
    quantized=True,
    input_size=32,
    headless=True,
    float_twin="cnv",
)
def _quant_cnv(num_classes: int, in_chans: int, w_bits: int, a_bits: int, first_w_bits: int = 8) -> CNV:
    from cnvzoo.models.quant import QuantLayers  # Brevitas takes a second to import

    first_w_bits = check_bits("first_w_bits", first_w_bits, "quant_cnv")
    return CNV(num_classes, in_chans, QuantLayers(w_bits, a_bits, first_w_bits))
