"""MobileNetV1 for small images, float and quantized.

Howard et al., "MobileNets", 2017 (arXiv:1704.04861), table 1, with stride 1 in the stem, so that a 32x32 image is a 2x2
map at the average pool.
"""

from __future__ import annotations

from torch import Tensor, nn

from cnvzoo.models.classifier import LayerBits, PooledClassifier
from cnvzoo.models.initialization import skips_initialization
from cnvzoo.models.layers import FloatLayers, Layers
from cnvzoo.models.norm_act import NormActSequential
from cnvzoo.models.registry import register_model

# (output channels, stride) of each depthwise-separable block
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNetV1(PooledClassifier):
    """Stem, 13 depthwise-separable blocks, global average pool, linear.

    Images [N, in_chans, H, W] to logits [N, num_classes].

    Args:
        num_classes: number of logits; 0 for no last layer.
        in_chans: channels of the images.
        layers: factory of the layers: `FloatLayers()`, or `QuantLayers` of `cnvzoo.models.quant_layers`.
    """

    def __init__(self, num_classes: int, in_chans: int, layers: Layers) -> None:
        super().__init__(layers)
        self.input = layers.input()
        channels = 32
        steps = [self._norm_relu(layers.conv(in_chans, channels, 3, padding=1, first=True), channels)]
        for out_channels, stride in _BLOCKS:
            steps.append(self._norm_relu(layers.depthwise(channels, stride), channels))
            steps.append(self._norm_relu(layers.pointwise(channels, out_channels), out_channels))
            channels = out_channels
        self.features = nn.Sequential(*steps)
        self.num_features = self.head_hidden_size = channels
        self.fc = self.new_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not skips_initialization():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        layers.finish(self)

    def _norm_relu(self, conv: nn.Module, channels: int) -> nn.Module:
        return NormActSequential(conv, nn.BatchNorm2d(channels), self.layers.relu())

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to the last block's features [N, 1024, h, w]."""
        return self.features(self.input(x))


@register_model("mobilenet_v1", summary="MobileNetV1 (Howard et al. 2017) with a stride-1 stem", headless=True)
def _mobilenet_v1(num_classes: int, in_chans: int) -> MobileNetV1:
    return MobileNetV1(num_classes, in_chans, FloatLayers())


@register_model(
    "quant_mobilenet_v1",
    summary="MobileNetV1 (Howard et al. 2017) with a stride-1 stem, with weights of w_bits and activations of a_bits",
    quantized=True,
    headless=True,
    float_twin="mobilenet_v1",
)
def _quant_mobilenet_v1(
    num_classes: int, in_chans: int, w_bits: int, a_bits: int, first_w_bits: int = 8, bits: LayerBits | None = None
) -> MobileNetV1:
    from cnvzoo.models.quant_layers import QuantLayers  # Brevitas takes a second to import

    return MobileNetV1(num_classes, in_chans, QuantLayers(w_bits, a_bits, first_w_bits, bits))
