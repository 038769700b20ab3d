"""The integer graph of a quantized CNV: its layers as integers, and a reference implementation that runs them.

A hidden layer of the trained model has integer weights w with scale s_w, an input of integer levels x with scale s_x,
a BatchNorm y -> g * y + h with g = gamma / sigma, and an activation quantizer with scale s_a. It computes

    level = clip(round((g * s_w * s_x * sum(w * x) + h) / s_a), 0, 2^a_bits - 1)

which is clip(round(multiplier * accumulator + offset)) of the integer accumulator sum(w * x). The weights are those
that were trained. In channels with negative gamma, weights and multiplier change sign: all multipliers are positive,
so max pooling and requantization can be swapped.

In the integer graph the bias is an int32, added to the accumulator. Weights of few bits are multiplied by an integer,
the gain, as large as int8 allows, which makes the unit of the bias that much finer. A model whose biases were quantized
(`cnvzoo.quantize_bias`) has biases that are multiples of that unit, so that nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import nn

from cnvzoo.deploy.requantize import Requantization, Staircase, levels, requantize
from cnvzoo.models.cnv import CNV
from cnvzoo.models.integers import int8_gain
from cnvzoo.models.quant import quantizer_of
from cnvzoo_runtime.metadata import DeployError

_SIZE = 32  # height and width of the input of a CNV
_LARGEST_PIXEL = 255


@dataclass(frozen=True)
class HiddenLayer:
    """A convolution or linear layer with BatchNorm, quantized ReLU and, if there is one, max pooling.

    Attributes:
        name: name of the convolution or linear layer in the model, such as `features.0`.
        weight: int8 [out, in, height, width], before multiplication by the gain; linear layers are 1x1. The range is
            -(2^(w_bits-1) - 1) to 2^(w_bits-1) - 1, and -1 or 1 for 1 bit.
        w_bits: bit width of the weights.
        requantization: from accumulators to levels.
        high: the largest level, 2^a_bits - 1.
        pooled: whether a 2x2 max pooling with stride 2 follows.
        linear: whether it is a linear layer; its input is flattened.
    """

    name: str
    weight: NDArray[np.int8]
    w_bits: int
    requantization: Requantization
    high: int
    pooled: bool
    linear: bool

    @property
    def scaled_weight(self) -> NDArray[np.int8]:
        """The weights times the gain, [out, in, height, width]."""
        return self.weight * np.int8(self.requantization.gain)


@dataclass(frozen=True)
class IntegerNet:
    """The whole network: uint8 images [N, in_chans, size, size] to int32 accumulators [N, num_classes].

    Attributes:
        hidden: all layers but the last, in order, convolutions first.
        head: int8 [num_classes, features], weights of the last layer.
        head_bits: bit width of these weights.
        scale: logits = scale * accumulators of the last layer.
        in_chans, size: channels and side of the images.
    """

    hidden: tuple[HiddenLayer, ...]
    head: NDArray[np.int8]
    head_bits: int
    scale: float
    in_chans: int
    size: int

    @property
    def differing(self) -> int:
        """Number of reachable accumulators, over all channels, whose level differs from the trained model's."""
        return int(sum(layer.requantization.differing.sum() for layer in self.hidden))

    @property
    def reachable(self) -> int:
        """Number of reachable accumulators over all channels."""
        return int(sum(layer.requantization.reachable.sum() for layer in self.hidden))


@torch.no_grad()
def integer_net(model: nn.Module) -> IntegerNet:
    """The layers of a quantized CNV as integers.

    Raises:
        DeployError: a float model, a layer that the integer graph cannot express, or a parameter that is not finite.
    """
    net = quantized_cnv(model, "the integer graph")
    layers = [(f"features.{n}", m) for n, m in net.features.named_children()]
    layers += [(f"classifier.{n}", m) for n, m in net.classifier.named_children()]
    in_scale, in_high = float(quantizer_of(net.input).effective_scale()), _LARGEST_PIXEL
    hidden: list[HiddenLayer] = []
    position = 0
    while position < len(layers) - 1:
        name, weighted = layers[position]
        _check_weighted(name, weighted)
        norm, act = _norm_and_activation(layers, position)
        position += 3
        pooled = isinstance(layers[position][1], nn.MaxPool2d)
        if pooled:
            _check_pool(*layers[position])
            position += 1
        quantizer = quantizer_of(act)
        layer, out_scale = _hidden_layer(name, weighted, norm, quantizer, in_scale, in_high, pooled=pooled)
        hidden.append(layer)
        in_scale, in_high = out_scale, quantizer.ints.high
    name, last = layers[-1]
    _check_weighted(name, last)
    head, scale = _integer_weights(last)
    if not isinstance(last, nn.Linear) or scale.numel() != 1:
        raise DeployError(f"{name}: the last layer must be linear, with one scale for all classes")
    in_chans = hidden[0].weight.shape[1]
    return IntegerNet(tuple(hidden), head, quantizer_of(last).bits, float(scale) * in_scale, in_chans, _SIZE)


def quantized_cnv(model: nn.Module, graph: str) -> CNV:
    """`model`, if it is a `quant_cnv` with finite parameters; error messages name `graph`.

    Raises:
        DeployError: another topology, a float model, or a parameter that is not finite.
    """
    if not isinstance(model, CNV):
        raise DeployError(
            f"{graph} is for quant_cnv, not for {type(model).__name__}: use format='onnx' for float models"
        )
    if isinstance(model.input, nn.Identity):
        raise DeployError("this CNV is a float model: quantize it (cnvzoo.quantize, then train), or use format='onnx'")
    bad = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise DeployError(f"{', '.join(bad[:3])}: not finite numbers: train the model again from an earlier state")
    return model


def run_reference(net: IntegerNet, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Run the network in numpy: uint8 images [N, in_chans, size, size] to int32 accumulators [N, num_classes].

    It is slow, and shares no code with ONNX Runtime, whose output it checks.
    """
    x = images
    for layer in net.hidden:
        if layer.linear:
            x = x.reshape(len(x), -1, 1, 1)
        chosen = layer.requantization
        acc = _convolution(x, layer.scaled_weight)
        x = levels(acc, chosen.bias[:, None, None], chosen.multiplier[:, None, None], layer.high)
        if layer.pooled:
            x = _max_pool(x)
    return _convolution(x.reshape(len(x), -1, 1, 1), net.head[:, :, None, None])[:, :, 0, 0].astype(np.int32)


def _convolution(x: NDArray[np.uint8], weight: NDArray[np.int8]) -> NDArray[np.int64]:
    height, width = weight.shape[2:]
    windows = sliding_window_view(x, (height, width), axis=(2, 3))  # [N, in, rows, columns, height, width]
    n, _, rows, columns = windows.shape[:4]
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * rows * columns, -1).astype(np.float64)
    sums = patches @ weight.reshape(len(weight), -1).T.astype(np.float64)  # exact: far below 2^53
    return sums.reshape(n, rows, columns, len(weight)).transpose(0, 3, 1, 2).astype(np.int64)


def _max_pool(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = [x[:, :, row:rows:2, column:columns:2] for row in (0, 1) for column in (0, 1)]
    return np.maximum.reduce(corners)


def _check_weighted(name: str, layer: nn.Module) -> None:
    from brevitas.nn import QuantConv2d, QuantLinear

    if not isinstance(layer, (QuantConv2d, QuantLinear)):
        raise DeployError(
            f"{name}: {type(layer).__name__} cannot be expressed in the integer graph, which has a quantized "
            "convolution or linear layer here"
        )
    if layer.bias is not None:
        raise DeployError(f"{name}: has a bias; in the integer graph only BatchNorm has one")
    if isinstance(layer, QuantConv2d) and (
        layer.groups != 1 or layer.stride != (1, 1) or layer.dilation != (1, 1) or layer.padding != (0, 0)
    ):
        raise DeployError(f"{name}: only convolutions without padding, stride, dilation and groups can be expressed")


def _norm_and_activation(layers: list[tuple[str, nn.Module]], position: int) -> tuple[Any, Any]:
    """The BatchNorm and the quantized ReLU after the layer at `position`."""
    from brevitas.nn import QuantReLU

    expected = ("a BatchNorm", (nn.BatchNorm1d, nn.BatchNorm2d)), ("a quantized ReLU", QuantReLU)
    found = []
    for (name, layer), (words, types) in zip(layers[position + 1 : position + 3], expected, strict=False):
        if not isinstance(layer, types):
            raise DeployError(
                f"{name}: {type(layer).__name__} cannot be expressed in the integer graph, which has {words} here"
            )
        found.append(layer)
    if len(found) < 2:
        raise DeployError(f"{layers[position][0]}: must be followed by a BatchNorm and a quantized ReLU")
    return found[0], found[1]


def _check_pool(name: str, pool: nn.Module) -> None:
    two = (2, (2, 2))
    assert isinstance(pool, nn.MaxPool2d)
    if pool.kernel_size not in two or pool.stride not in two or pool.padding not in (0, (0, 0)) or pool.ceil_mode:
        raise DeployError(f"{name}: only 2x2 max pooling with stride 2 can be expressed in the integer graph")


def _hidden_layer(
    name: str, layer: Any, norm: Any, act: Any, in_scale: float, in_high: int, *, pooled: bool
) -> tuple[HiddenLayer, float]:
    """The layer as integers, and the scale of its output levels.

    Computed in float64, whose rounding is negligible next to the float32 of training.
    """
    weight, weight_scale = _integer_weights(layer)
    out_scale, quantizer = float(act.effective_scale()), quantizer_of(layer)
    sigma = np.sqrt(_float64(norm.running_var) + norm.eps)
    slope = _float64(norm.weight) / sigma
    multiplier = slope * _float64(weight_scale).reshape(-1) * in_scale / out_scale
    offset = (_float64(norm.bias) - _float64(norm.running_mean) * slope) / out_scale
    weight = weight.reshape(*weight.shape, *(1,) * (4 - weight.ndim))
    weight = np.where(multiplier[:, None, None, None] < 0, -weight, weight)
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    exact = Staircase(
        np.abs(multiplier), offset, in_high * np.minimum(rows, 0).sum(1), in_high * np.maximum(rows, 0).sum(1),
        act.ints.high,
    )  # fmt: skip
    weight, chosen = _requantize(weight, exact, int8_gain(quantizer.ints))
    linear = isinstance(layer, nn.Linear)
    return HiddenLayer(name, weight, quantizer.bits, chosen, act.ints.high, pooled, linear), out_scale


def _integer_weights(layer: Any) -> tuple[NDArray[np.int8], torch.Tensor]:
    """The integer weights of a layer and their scale, rounded in float32 as by the fake quantizer."""
    quantizer = quantizer_of(layer)
    scale = quantizer.effective_scale().detach().cpu()
    return quantizer.integers(layer.weight.detach()).to(torch.int8).cpu().numpy(), scale


def _requantize(weight: NDArray[np.int8], exact: Staircase, gain: int) -> tuple[NDArray[np.int8], Requantization]:
    """Requantize a layer, with special treatment of channels that have the same level for every input.

    Such a channel gets weights of 0, multiplier 1 and its level as the bias: its own multiplier may be zero, and its
    own bias may not fit an int32.
    """
    chosen = requantize(exact, gain)
    ends = np.rint(exact.multiplier[:, None] * np.stack([exact.low_acc, exact.high_acc], 1) + exact.offset[:, None])
    ends = np.clip(ends, 0, exact.high)
    constant = ends[:, 0] == ends[:, 1]
    chosen.bias[constant] = ends[constant, 0].astype(np.int32)
    chosen.multiplier[constant] = 1
    chosen.differing[constant] = 0
    weight = weight.copy()
    weight[constant] = 0
    return weight, chosen


def _float64(x: torch.Tensor) -> NDArray[np.float64]:
    return x.detach().cpu().double().numpy()
