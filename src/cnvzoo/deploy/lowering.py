"""From a trained quantized model to its integer net: which layers belong together, and what they are as integers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cnvzoo.deploy.integer import Head, Image, IntegerNet, Layer, Node, Rounding, Sum
from cnvzoo.deploy.requantize import Requantization, StepFunctions, reachable_accumulators, requantize
from cnvzoo.errors import ModelError
from cnvzoo.models.graph import FLATTEN, GLOBAL_POOL, LayerCall, trace
from cnvzoo.models.integers import int8_gain
from cnvzoo.models.norm_act import QuantizedResidualActivation
from cnvzoo.models.quant import quantizer_of
from cnvzoo.models.residual import ADDEND
from cnvzoo_runtime.metadata import DeployError

_LARGEST_PIXEL = 255
_LARGEST_SUM = 255  # of the levels of two inputs
_PIXEL_SCALE = float(np.float32(1 / 255))
_LARGEST_INT32 = (1 << 31) - 1


@torch.no_grad()
def integer_net(model: nn.Module, size: int = 32) -> IntegerNet:
    """The layers of a quantized model as integers.

    Args:
        model: a quantized model, in which each convolution or linear layer but the last is followed by a BatchNorm and
            a quantized activation.
        size: height and width of the images, in pixels.

    Raises:
        DeployError: a float model, a layer that the integer graph cannot express, a parameter that is not finite, or
            accumulators that may leave int32.
    """
    calls = quantized_calls(model, "the integer graph")
    convolutions = (call.layer.in_channels for call in calls if isinstance(call.layer, nn.Conv2d))
    channels = next(convolutions, getattr(model, "in_chans", 0))
    return _Lowering(calls, channels, size).net()


def check_quantized(model: nn.Module, graph: str = "the integer graph") -> None:
    """Raise DeployError, naming `graph`, for a model without quantized layers."""
    from brevitas.nn import QuantConv2d, QuantLinear

    if not any(isinstance(layer, (QuantConv2d, QuantLinear)) for layer in model.modules()):
        raise DeployError(
            f"{graph} is for quantized models, and this {type(model).__name__} is a float model: quantize it "
            "(cnvzoo.quantize, then train), or use format='onnx'"
        )


def quantized_calls(model: nn.Module, graph: str) -> list[LayerCall]:
    """The calls of a quantized model with finite parameters; error messages name `graph`.

    Raises:
        DeployError: a float model, a parameter that is not finite, or a model that is more than a graph of layers.
    """
    from cnvzoo.models.quant import check_quantizers

    check_quantized(model, graph)
    bad = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise DeployError(f"{', '.join(bad[:3])}: not finite numbers: train the model again from an earlier state")
    try:
        calls = trace(model)
        layers = {call.name: call.layer for call in calls if call.layer is not None}
        check_quantizers(layers)
        if graph != "QONNX":  # which PyTorch exports from what the layers do
            _check_forwards(layers)
        return calls
    except ModelError as error:
        raise DeployError(f"{graph} cannot express this model: {error}") from None


def _check_forwards(layers: Mapping[str, nn.Module]) -> None:
    """Raise ModelError for a layer in a class of a user, which may do something else than its kind.

    Hooks are left out of the graph, as most only observe.
    """
    for name, layer in layers.items():
        if not type(layer).__module__.startswith(("cnvzoo.models.", "brevitas.nn.", "torch.nn.")):
            kind = type(layer).__qualname__
            raise ModelError(f"{name} is of the class {kind}, whose forward may be another: use a layer of cnvzoo")


@dataclass(frozen=True)
class _Levels:
    """What a node gives: integers times `scale`, [N, *shape]."""

    node: int
    scale: float
    high: int
    shape: tuple[int, int, int]  # channels, rows, columns
    flattened: bool = False
    pooled: bool = False  # summed over all pixels, by the head


@dataclass(frozen=True)
class _Weighted:
    """What a convolution or linear layer gives, with the BatchNorm after it, if there is one."""

    call: LayerCall
    taken: _Levels
    norm: Any = None


class _Lowering:
    """Goes through the calls of a model, and collects the nodes of its integer net."""

    def __init__(self, calls: Sequence[LayerCall], in_chans: int, size: int) -> None:
        self.calls = calls
        self.nodes: list[Node] = [Image("image", (), in_chans, size)]
        self.given: list[_Levels | _Weighted] = [_Levels(0, _PIXEL_SCALE, _LARGEST_PIXEL, (in_chans, size, size))]
        self.uses = [sum(i in call.inputs for call in calls) for i in range(len(calls))]

    def net(self) -> IntegerNet:
        for call in self.calls[1:]:
            self.given.append(self._output(call, [self.given[i] for i in call.inputs]))
        last = self.given[-1]
        if not isinstance(last, _Weighted) or not isinstance(last.call.layer, nn.Linear) or last.norm is not None:
            raise DeployError(f"{self.calls[-1].name}: the last layer must be linear, with one scale for all classes")
        self._add(_head(last))
        return IntegerNet(tuple(self.nodes))

    def _add(self, node: Node) -> int:
        """The position of a new node, whose name is changed if another node has it."""
        names, name, count = {n.name for n in self.nodes}, node.name, 1
        while name in names:
            count += 1
            name = f"{node.name}.{count}"
        self.nodes.append(replace(node, name=name))
        return len(self.nodes) - 1

    def _output(self, call: LayerCall, taken: list[_Levels | _Weighted]) -> _Levels | _Weighted:
        """What a call gives, after the nodes that compute it were added."""
        from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU

        layer, (x, *others) = call.layer, taken
        if isinstance(x, _Levels) and not others:
            if call.name == FLATTEN:
                return replace(x, flattened=True)
            if isinstance(layer, (QuantConv2d, QuantLinear)):
                _check_weighted(call.name, layer, x)
                return _Weighted(call, x)
            if x.pooled:
                raise _unexpected(call, "the last layer, which is linear,")
            if isinstance(layer, QuantIdentity):
                return self._rounded(call, x)
            if isinstance(layer, nn.MaxPool2d) and not x.flattened:
                return self._max_pooled(call, x)
            if call.name == GLOBAL_POOL and not x.flattened:
                return replace(x, pooled=True)
            raise _unexpected(call, "a quantized convolution or linear layer")
        if isinstance(x, _Weighted) and x.norm is None:
            if not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) or others:
                raise _unexpected(call, "a BatchNorm")
            if layer.weight is None or layer.running_var is None:
                raise DeployError(f"{call.name}: must have a weight, a bias and running statistics")
            return replace(x, norm=layer)
        if not isinstance(x, _Weighted) or not isinstance(layer, QuantReLU):
            raise _unexpected(call, "a quantized ReLU")
        if others:
            return self._sum(call, x, others[0])
        quantizer = quantizer_of(layer)
        return self._activation(x, float(quantizer.effective_scale()), 0, quantizer.ints.high)

    def _activation(self, weighted: _Weighted, scale: float, low: int, high: int) -> _Levels:
        node = _layer(weighted, scale, low, high)
        return _Levels(self._add(node), scale, high, _output_shape(node, weighted.taken.shape))

    def _sum(self, call: LayerCall, x: _Weighted, residual: _Levels | _Weighted) -> _Levels:
        if not isinstance(call.layer, QuantizedResidualActivation):
            raise _unexpected(call, "a quantized activation that adds")
        quantizer = quantizer_of(call.layer)
        if quantizer.ints.high != _LARGEST_SUM:
            raise DeployError(f"{call.name}: sums have 8 bits in the integer graph: give its quantizer 8 bits")
        scale = float(quantizer.effective_scale())
        added = self._activation(x, scale, ADDEND.low, ADDEND.high)
        if isinstance(residual, _Weighted) and residual.norm is not None and not call.rounded:
            residual = self._activation(residual, scale, ADDEND.low, ADDEND.high)
        elif not (isinstance(residual, _Levels) and call.rounded and residual.scale == scale):
            raise DeployError(
                f"{call.name}: can add an earlier output of itself, or of a BatchNorm with rounded=False, to "
                f"{x.call.name}, and no other residual"
            )
        inputs = added.node, residual.node
        return replace(added, node=self._add(Sum(f"{x.call.name}.sum", inputs)), high=quantizer.ints.high)

    def _rounded(self, call: LayerCall, x: _Levels) -> _Levels:
        """Levels of another scale or fewer bits."""
        quantizer = quantizer_of(call.layer)  # type: ignore[arg-type]
        scale, high = float(quantizer.effective_scale()), quantizer.ints.high
        if scale == x.scale and x.high <= high:
            return x
        start, end = np.zeros(1, np.int64), np.full(1, x.high)
        exact = StepFunctions(np.array([x.scale / scale]), np.zeros(1), start, end, high)
        node = Rounding(call.name, (x.node,), requantize(exact, 1, biased=False))
        return replace(x, node=self._add(node), scale=scale, high=high)

    def _max_pooled(self, call: LayerCall, x: _Levels) -> _Levels:
        from brevitas.nn import QuantReLU

        pool, node, two = call.layer, self.nodes[x.node], (2, (2, 2))
        assert isinstance(pool, nn.MaxPool2d)
        if pool.kernel_size not in two or pool.stride not in two or pool.padding not in (0, (0, 0)) or pool.ceil_mode:
            raise DeployError(f"{call.name}: only 2x2 max pooling with stride 2 can be expressed in the integer graph")
        if pool.dilation not in (1, (1, 1)):
            raise DeployError(f"{call.name}: max pooling with dilation cannot be expressed in the integer graph")
        (taken,) = call.inputs
        is_activation = isinstance(self.calls[taken].layer, QuantReLU)
        if not isinstance(node, Layer) or not is_activation or self.uses[taken] > 1:
            raise DeployError(f"{call.name}: only the output of one activation, used once, can be pooled")
        self.nodes[x.node] = replace(node, pooled=True)
        channels, rows, columns = x.shape
        return replace(x, shape=(channels, rows // 2, columns // 2))


def _unexpected(call: LayerCall, expected: str) -> DeployError:
    what = call.name if call.layer is None else f"{call.name}: {type(call.layer).__name__}"
    return DeployError(f"{what} cannot be expressed in the integer graph, which has {expected} here")


def _check_weighted(name: str, layer: Any, taken: _Levels) -> None:
    """Raise DeployError for a layer that the integer graph cannot express."""
    features = taken.shape[0] if taken.pooled else math.prod(taken.shape)
    if isinstance(layer, nn.Linear):
        if not (taken.flattened or taken.shape[1:] == (1, 1)):
            raise DeployError(f"{name}: its input must be flattened first")
        if layer.in_features != features:
            raise DeployError(f"{name}: takes {layer.in_features} features, and images of this size give {features}")
        return
    if taken.flattened or taken.pooled:
        raise DeployError(f"{name}: a convolution after a flattening or an average cannot be expressed")
    if layer.bias is not None:
        raise DeployError(f"{name}: has a bias; in the integer graph only BatchNorm and the last layer have one")
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise DeployError(
            f"{name}: only convolutions without dilation, padded with a number of zeros, can be expressed"
        )


def _layer(weighted: _Weighted, out_scale: float, low: int, high: int) -> Layer:
    """The layer as integers, with outputs from low to high.

    Computed in float64, whose rounding is negligible next to the float32 of training.
    """
    name, layer, taken, norm = weighted.call.name, weighted.call.layer, weighted.taken, weighted.norm
    if layer.bias is not None or taken.pooled:  # type: ignore[union-attr]
        what = "is averaged over pixels" if taken.pooled else "has a bias"
        raise DeployError(f"{name}: {what}; in the integer graph only the last layer may be so")
    weight, weight_scale, bits = _integer_weights(layer)
    is_linear = isinstance(layer, nn.Linear)
    sigma = np.sqrt(_float64(norm.running_var) + norm.eps)
    slope = _float64(norm.weight) / sigma
    multiplier = slope * _float64(weight_scale).reshape(-1) * taken.scale / out_scale
    offset = (_float64(norm.bias) - _float64(norm.running_mean) * slope) / out_scale
    weight = weight.reshape(len(weight), *taken.shape) if is_linear else weight
    weight = np.where(multiplier[:, None, None, None] < 0, -weight, weight)
    low_acc, high_acc = reachable_accumulators(weight.reshape(len(weight), -1), taken.high)
    exact = StepFunctions(np.abs(multiplier), offset, low_acc, high_acc, high, low)
    gain = int8_gain(quantizer_of(layer).ints)  # type: ignore[arg-type]
    weight, chosen = _requantize(weight, exact, gain)
    if not chosen.fits_int32(exact):
        raise DeployError(f"{name}: its accumulators may leave int32: use fewer weights for each output, or fewer bits")
    node = Layer(name, (taken.node,), weight, bits, chosen, linear=is_linear and taken.shape[1:] == (1, 1))
    if isinstance(layer, nn.Conv2d):
        stride, padding = _pair(layer.stride), _pair(layer.padding)
        node = replace(node, stride=stride, padding=padding, groups=layer.groups)
    return node


def _pair(values: Any) -> tuple[int, int]:
    rows, columns = values
    return int(rows), int(columns)


def _output_shape(node: Layer, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Channels, rows and columns of the output of a layer, before it is pooled."""
    rows, columns = node.output_sides(*shape[1:])
    if min(rows, columns) < 1:
        raise DeployError(f"{node.name}: has a larger kernel than its input of {shape[1]}x{shape[2]} pixels")
    return len(node.weight), rows, columns


def _head(weighted: _Weighted) -> Head:
    name, layer, taken = weighted.call.name, weighted.call.layer, weighted.taken
    weight, scale, bits = _integer_weights(layer)
    if scale.numel() != 1:
        raise DeployError(f"{name}: the last layer must be linear, with one scale for all classes")
    pixels = taken.shape[1] * taken.shape[2] if taken.pooled else None
    unit, gain, bias = float(scale) * taken.scale, 1, None
    if layer.bias is not None:  # type: ignore[union-attr]
        gain = int8_gain(quantizer_of(layer).ints)  # type: ignore[arg-type]  (makes the unit of the bias finer)
        unit /= gain
    unit /= pixels or 1
    largest = taken.high * (pixels or 1) * gain * np.abs(weight.astype(np.int64)).sum(1).max()
    if layer.bias is not None:  # type: ignore[union-attr]
        whole = np.rint(_float64(layer.bias) / unit)  # type: ignore[arg-type, union-attr]
        largest += np.abs(whole).max()
        bias = np.clip(whole, -_LARGEST_INT32, _LARGEST_INT32).astype(np.int32)
    if largest > _LARGEST_INT32:
        raise DeployError(f"{name}: its accumulators may leave int32: use smaller images, or fewer bits or features")
    return Head(name, (taken.node,), weight, bits, gain, bias, pixels, unit)


def _integer_weights(layer: Any) -> tuple[NDArray[np.int8], torch.Tensor, int]:
    """The integer weights of a layer, rounded in float32 as by the fake quantizer, their scale and bit width."""
    quantizer = quantizer_of(layer)
    scale = quantizer.effective_scale().detach().cpu()
    return quantizer.integers(layer.weight.detach()).to(torch.int8).cpu().numpy(), scale, quantizer.bits


def _requantize(weight: NDArray[np.int8], exact: StepFunctions, gain: int) -> tuple[NDArray[np.int8], Requantization]:
    """Requantize a layer, with special treatment of channels that have the same level for every input.

    Such a channel gets weights of 0, multiplier 1 and its level as the bias: its own multiplier may be zero, and its
    own bias may not fit an int32.
    """
    chosen = requantize(exact, gain)
    ends = exact.multiplier[:, None] * np.stack([exact.low_acc, exact.high_acc], 1) + exact.offset[:, None]
    ends = exact.clipped(ends)
    constant = ends[:, 0] == ends[:, 1]
    chosen.bias[constant] = ends[constant, 0].astype(np.int32)
    chosen.multiplier[constant] = 1
    chosen.differing[constant] = 0
    weight = weight.copy()
    weight[constant] = 0
    return weight, chosen


def _float64(x: torch.Tensor) -> NDArray[np.float64]:
    return x.detach().cpu().double().numpy()
