"""CIFAR ResNets (20 to 110 layers) and ResNet-18 with a stem for small images, float and quantized.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385): section 4.2 for the CIFAR networks,
table 1 for ResNet-18. Shortcuts that change the shape are 1x1 convolutions with BatchNorm (option B there).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cnvzoo.models.classifier import LayerBits, PooledClassifier
from cnvzoo.models.initialization import skips_initialization
from cnvzoo.models.layers import FloatLayers, Layers
from cnvzoo.models.norm_act import NormActSequential, block_inputs, norm_act
from cnvzoo.models.registry import register_model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, in, H, W] to [N, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, layers: Layers) -> None:
        super().__init__()
        self.input = layers.block_input()
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu = layers.relu()
        self.conv2 = layers.conv(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        self.changes_shape = stride != 1 or in_channels != out_channels
        if self.changes_shape:
            self.shortcut = NormActSequential(
                layers.conv(in_channels, out_channels, 1, stride=stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor, relu: nn.Module) -> Tensor:
        """The output of the block; `relu` is the activation after the addition, which the blocks of a stage share."""
        x, taken = block_inputs(x, self.input)
        y = norm_act(self.conv1(taken), self.norm1, self.relu)
        residual = self.shortcut(taken if self.changes_shape else x)
        return norm_act(self.conv2(y), self.norm2, relu, residual=residual, rounded=not self.changes_shape)


class Stage(nn.Sequential):
    """Blocks whose outputs have one scale, so that quantized ones are added as integers: that of `relu`.

    The blocks are called 0, 1, and so on, as in `nn.Sequential`, and come first in it.
    """

    relu: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        *blocks, relu = self
        x = input
        for block in blocks:
            x = block(x, relu)
        return x


class ResNet(PooledClassifier):
    """3x3 stem, stages of basic blocks (stride 2 from the second stage on), global average pool, linear.

    Args:
        widths: channels of each stage; the stem has as many as the first stage.
        depths: number of blocks of each stage.
        num_classes: number of logits; 0 for no last layer.
        in_chans: channels of the images.
        layers: factory of the layers: `FloatLayers()`, or `QuantLayers` of `cnvzoo.models.quant_layers`.
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], num_classes: int, in_chans: int, layers: Layers
    ) -> None:
        super().__init__(layers)
        self.input = layers.input()
        self.conv = layers.conv(in_chans, widths[0], 3, padding=1, first=True)
        self.norm = nn.BatchNorm2d(widths[0])
        channels, stages = widths[0], []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = Stage()
            for block in range(depth):
                stage.append(BasicBlock(channels, width, 2 if index and not block else 1, layers))
                channels = width
            stage.relu = layers.residual_relu(depth + 1)  # each block, and the stem or the shortcut
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = channels
        self.fc = self.new_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not skips_initialization():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        layers.finish(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to the last stage's features [N, num_features, h, w]."""
        first = self.stages[0]
        assert isinstance(first, Stage)  # the output of the stem is added to that of its first block
        return self.stages(norm_act(self.conv(self.input(x)), self.norm, first.relu))


@torch.no_grad()
def start_from_shallower(model: ResNet, state: Mapping[str, Tensor]) -> None:
    """Copy the weights of a float ResNet with fewer blocks into `model`, in place; the function stays the same.

    The n blocks of a stage take places spread over the m of `model`, block i place i * m // n. The convolutions of the
    other blocks keep their values, and their last BatchNorm has weight 0, as in Goyal et al. 2017 (arXiv:1706.02677,
    section 5.1): such a block returns its input until training changes it. Training a deep net from a shallower one
    takes less time than from nothing (Chang et al. 2018, arXiv:1710.10348).

    Args:
        model: a new float ResNet.
        state: state_dict of one of the same widths, classes and channels, with as many or fewer blocks in each stage.

    Raises:
        ValueError: `state` is that of another net, or incomplete; the message names the first tensor without a
            counterpart.
    """
    own = model.state_dict()
    places: dict[str, str] = {}  # by the name of a block in `state`
    for index, stage in enumerate(model.stages):
        there = {key.split(".")[2] for key in state if key.startswith(f"stages.{index}.")}
        for block in range(len(there)):
            places[f"stages.{index}.{block}"] = f"stages.{index}.{block * _depth_of(stage) // len(there)}"
    moved = {}
    for key, tensor in state.items():
        block = ".".join(key.split(".")[:3])
        name = key.replace(block, places[block], 1) if block in places else key
        if name in moved or name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"{key}: not a tensor of a shallower net of these widths, classes and channels")
        moved[name] = tensor
    blocks = [f"stages.{index}.{n}" for index, stage in enumerate(model.stages) for n in range(_depth_of(stage))]
    added = [block for block in blocks if block not in places.values()]
    for key in own:
        if key not in moved and not any(key.startswith(f"{block}.") for block in added):
            raise ValueError(f"{key}: missing in the weights of the shallower net")
    model.load_state_dict({**own, **moved}, strict=True)
    for block in added:
        nn.init.zeros_(model.get_parameter(f"{block}.norm2.weight"))


def _depth_of(stage: nn.Module) -> int:
    return sum(isinstance(module, BasicBlock) for module in stage.children())


def _resnet(widths: Sequence[int], depths: Sequence[int], num_classes: int, in_chans: int) -> ResNet:
    return ResNet(widths, depths, num_classes, in_chans, FloatLayers())


def _quant_resnet(
    widths: Sequence[int], depths: Sequence[int], num_classes: int, in_chans: int, w_bits: int, a_bits: int,
    first_w_bits: int = 8, bits: LayerBits | None = None,
) -> ResNet:  # fmt: skip
    from cnvzoo.models.quant_layers import QuantLayers  # Brevitas takes a second to import

    return ResNet(widths, depths, num_classes, in_chans, QuantLayers(w_bits, a_bits, first_w_bits, bits))


def _register(
    name: str, summary: str, widths: Sequence[int], depths: Sequence[int], shallower: tuple[str, ...] = ()
) -> None:
    bind = functools.partial
    register_model(name, summary=summary, shallower=shallower, headless=True)(bind(_resnet, widths, depths))
    register_model(
        f"quant_{name}", summary=f"{summary}, with weights of w_bits and activations of a_bits", quantized=True,
        float_twin=name, headless=True,
    )(bind(_quant_resnet, widths, depths))  # fmt: skip


_DEPTHS = (20, 32, 44, 56, 110)  # 6n + 2 layers
for _depth in _DEPTHS:
    _register(
        f"resnet{_depth}",
        f"CIFAR ResNet of {_depth} layers (He et al. 2015, section 4.2)",
        (16, 32, 64),
        (_depth // 6,) * 3,
        shallower=tuple(f"resnet{depth}" for depth in _DEPTHS if depth < _depth),
    )
_register(
    "resnet18",
    "ImageNet ResNet-18 (He et al. 2015) with a 3x3 stride-1 stem, no maxpool",
    (64, 128, 256, 512),
    (2,) * 4,
)
