"""CNV, the VGG-like network of FINN: one graph, which the float and the quantized model fill with their own layers.

Umuroglu et al., "FINN", 2017 (arXiv:1612.07119), section 5: six 3x3 convolutions without padding, two max pools and
three linear layers, with BatchNorm after every layer but the last. No layer has a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnvzoo.models.classifier import Classifier, LayerBits
from cnvzoo.models.initialization import init_weight, skips_initialization
from cnvzoo.models.layers import FloatLayers, Layers
from cnvzoo.models.norm_act import NormActSequential
from cnvzoo.models.registry import register_model

_CONVS = (64, 64, "pool", 128, 128, "pool", 256, 256)
_HIDDEN = (512, 512)
_NORM_EPS = 1e-4


class CNV(Classifier):
    """Images [N, in_chans, 32, 32] to logits [N, num_classes].

    The features are those of the convolutions, [N, 256, 1, 1]. The head is the three linear layers, the last of which
    takes [N, 512].

    Args:
        num_classes: number of logits; 0 for no last layer.
        in_chans: channels of the images.
        layers: factory of the layers: `FloatLayers()`, or `QuantLayers` of `cnvzoo.models.quant_layers`.
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
            self.features.append(_initialized(layers.conv(channels, step, 3, first=index == 0)))
            self.features.append(nn.BatchNorm2d(step, eps=_NORM_EPS))
            self.features.append(layers.relu())
            channels = step
        self.num_features = channels
        self.classifier = nn.Sequential()
        for width in _HIDDEN:
            self.classifier.append(_initialized(layers.linear(channels, width, last=False)))
            self.classifier.append(nn.BatchNorm1d(width, eps=_NORM_EPS))
            self.classifier.append(layers.relu())
            channels = width
        self.head_hidden_size = channels
        self.classifier.append(self.new_classifier(num_classes))
        layers.finish(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, 32, 32] to features [N, 256, 1, 1]."""
        return self.features(self.input(x))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [N, 256, 1, 1] to logits [N, num_classes], or to what the last layer takes, [N, 512]."""
        layers = self.classifier[:-1] if pre_logits else self.classifier
        return layers(torch.flatten(features, 1))

    def get_classifier(self) -> nn.Module:
        return self.classifier[-1]

    def new_classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        return _initialized(self.layers.linear(self.head_hidden_size, num_classes, last=True))

    def set_classifier(self, layer: nn.Module) -> None:
        self.classifier[-1] = layer
        self.layers.finish(self, layer)


def _initialized(layer: nn.Module) -> nn.Module:
    assert isinstance(layer.weight, Tensor)
    if not skips_initialization():
        init_weight(layer.weight)
    return layer


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
def _quant_cnv(
    num_classes: int, in_chans: int, w_bits: int, a_bits: int, first_w_bits: int = 8, bits: LayerBits | None = None
) -> CNV:
    from cnvzoo.models.quant_layers import QuantLayers  # Brevitas takes a second to import

    return CNV(num_classes, in_chans, QuantLayers(w_bits, a_bits, first_w_bits, bits))
