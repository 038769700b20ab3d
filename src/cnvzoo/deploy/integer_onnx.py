"""The ONNX graph of an integer net, of operators for which ONNX Runtime has fast kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnvzoo.deploy.graph_builder import GraphBuilder
from cnvzoo.deploy.integer import Head, IntegerNet, Layer, Rounding, Sum

INPUT, ACCUMULATORS, SCALE = "image", "accumulators", "scale"
_BATCH_TO_PIXELS = [2, 1, 0, 3]  # [N, C, 1, 1] to [1, C, N, 1], and back
_LARGEST_LEVEL = 255
_SMALL_LAYER = 1 << 16  # weights, on the average of a net: with fewer, names and unpacking are much of the file


def integer_graph(net: IntegerNet) -> onnx.ModelProto:
    """The integer graph, of operators for which ONNX Runtime has fast kernels.

    QLinearConv with scales of 1 and zero points of 0 is exactly a convolution in int32, plus a bias, times a float32
    multiplier for each channel, rounded half to even and saturated to 0..255; its per-channel weight scale is that
    multiplier. Clip then limits levels to a_bits; after the max pooling, which gives the same and is less work. Linear
    layers are 1x1 convolutions with the batch in the place of the height, so that each is one matrix product.

    A summand is stored as uint8 with a zero point of 128. ONNX Runtime computes the operators of a sum, and those that
    round to fewer bits, without float tensors between them where it can; sums of integers are exact either way.

    Returns:
        A model from uint8 `image` [N, in_chans, size, size] to int32 `accumulators` [N, classes], and float32 `scale`,
        a constant: logits are scale * accumulators.
    """
    graph = _NetWriter(net)
    head, image = net.head, net.image
    make = helper.make_tensor_value_info
    outputs = [make(ACCUMULATORS, TensorProto.INT32, ["N", len(head.weight)]), make(SCALE, TensorProto.FLOAT, [])]
    return graph.model(
        "cnvzoo_integer", make(INPUT, TensorProto.UINT8, ["N", image.channels, image.size, image.size]), outputs
    )


class _NetWriter(GraphBuilder):
    """The nodes and constants of a net."""

    def __init__(self, net: IntegerNet) -> None:
        weights = [layer.weight for layer in net.layers] + [net.head.weight]
        compact = sum(w.size for w in weights) < _SMALL_LAYER * len(weights)
        super().__init__((ACCUMULATORS, SCALE), compact=compact)
        self._one = self.add_constant("one", np.float32(1))
        self._zero = self.add_constant("zero", np.uint8(0))
        self._levels = [INPUT]  # the tensor of each node, uint8
        self._zero_points = [self._zero]
        self._transposed = [False]  # whether the batch is in the place of the rows
        self._weights: dict[str, str] = {}  # those of all layers, if they are unpacked together
        self._zeros: dict[str, str] = {}
        # prefix of the tensors of the head, which differs from the names of other layers
        self._head = net.head.name if any(layer.name == "head" for layer in net.layers) else "head"
        if compact and net.layers:
            self._zeros = self.add_zeros({layer.name: len(layer.weight) for layer in net.layers})
        if compact:
            self._weights = self.add_weights(
                {layer.name: layer.scaled_weight for layer in net.layers} | {net.head.name: _head_weight(net.head)}
            )
        for node in net.nodes:
            if isinstance(node, Layer):
                self._add_layer(node)
            elif isinstance(node, Rounding):
                self._add_rounding(node)
            elif isinstance(node, Sum):
                self._add_sum(node)
        self._add_head(net.head)

    def _input(self, position: int, *, transposed: bool) -> str:
        """The tensor of a node, with the batch in the place of the rows if `transposed`."""
        name = self._levels[position]
        if self._transposed[position] == transposed:
            return name
        output = "features" if transposed else "pixels"
        if any(output in node.output for node in self.nodes):
            output = f"{name}.{output}.{len(self.nodes)}"
        return self.add("Transpose", [name], output, perm=_BATCH_TO_PIXELS)

    def _added(self, levels: str, zero_point: str, *, transposed: bool) -> None:
        self._levels.append(levels)
        self._zero_points.append(zero_point)
        self._transposed.append(transposed)

    def _add_layer(self, layer: Layer) -> None:
        name, chosen, (taken,) = layer.name, layer.requantization, layer.inputs
        zero_point = self._zero if chosen.low == 0 else self.add_constant("half", np.uint8(-chosen.low))
        inputs = [
            self._input(taken, transposed=layer.linear), self._one, self._zero,
            self._weights.get(name) or self.add_weight(name, layer.scaled_weight),
            self.add_constant(f"{name}.multiplier", chosen.multiplier),
            self._zeros.get(name) or self.add_constant(f"{name}.zero", np.zeros(len(chosen.bias), np.int8)),
            self._one, zero_point,
            self.add_constant(f"{name}.bias", chosen.bias),
        ]  # fmt: skip
        attributes: dict[str, Any] = {} if self.compact else {"kernel_shape": list(layer.weight.shape[2:])}
        if layer.stride != (1, 1):
            attributes["strides"] = layer.stride
        if layer.padding != (0, 0):
            attributes["pads"] = layer.padding * 2
        if layer.groups != 1:
            attributes["group"] = layer.groups
        x = self.add("QLinearConv", inputs, f"{name}.levels", **attributes)
        self.nodes[-1].name = name if self.compact else x
        if layer.pooled:
            x = self.add("MaxPool", [x], f"{name}.pooled", kernel_shape=[2, 2], strides=[2, 2])
        self._added(self._clipped(name, x, chosen.high - chosen.low), zero_point, transposed=layer.linear)

    def _clipped(self, name: str, x: str, high: int) -> str:
        """Levels limited to `high`."""
        if high == _LARGEST_LEVEL:
            return x
        return self.add("Clip", [x, "", self.add_constant(f"{name}.high", np.uint8(high))], f"{name}.clipped")

    def _add_rounding(self, node: Rounding) -> None:
        (taken,), (multiplier,) = node.inputs, node.requantization.multiplier
        factor = self.add_constant(f"{node.name}.multiplier", multiplier)
        x = self.add("DequantizeLinear", [self._levels[taken], factor, self._zero], f"{node.name}.scaled")
        x = self.add("QuantizeLinear", [x, self._one, self._zero], f"{node.name}.levels")
        x = self._clipped(node.name, x, node.requantization.high)
        self._added(x, self._zero, transposed=self._transposed[taken])

    def _add_sum(self, node: Sum) -> None:
        transposed = self._transposed[node.inputs[0]]
        summands = []
        for i, key in zip(node.inputs, ("first", "second"), strict=True):
            levels = [self._input(i, transposed=transposed), self._one, self._zero_points[i]]
            summands.append(self.add("DequantizeLinear", levels, f"{node.name}.{key}"))
        x = self.add("Add", summands, f"{node.name}.total")
        x = self.add("QuantizeLinear", [x, self._one, self._zero], f"{node.name}.levels")
        self._added(x, self._zero, transposed=transposed)

    def _add_head(self, head: Head) -> None:
        (taken,) = head.inputs
        x = self.add("Flatten", [self._input(taken, transposed=False)], "flat")
        weight = self._weights.get(head.name) or self.add_weight(self._head, _head_weight(head))
        if head.pixels is not None:  # the weights of a channel are those of all its pixels
            channels, classes = head.weight.shape[::-1]
            repeated = self.add_constant(f"{self._head}.repeated_shape", np.array([channels, head.pixels, classes]))
            flat = self.add_constant(f"{self._head}.flat_shape", np.array([channels * head.pixels, classes]))
            weight = self.add("Expand", [weight, repeated], f"{self._head}.repeated")
            weight = self.add("Reshape", [weight, flat], f"{self._head}.flat")
        if head.bias is None:
            self.add("MatMulInteger", [x, weight], ACCUMULATORS)
        else:
            products = self.add("MatMulInteger", [x, weight], "products")
            self.add("Add", [products, self.add_constant(f"{self._head}.bias", head.bias)], ACCUMULATORS)
        self.add("Constant", [], SCALE, value=numpy_helper.from_array(np.array(head.scale, np.float32)))


def _head_weight(head: Head) -> np.ndarray:
    """The weights of the head as they are stored: [features, classes], or [features, 1, classes] to be repeated."""
    weight = np.ascontiguousarray(head.scaled_weight.T)
    return weight if head.pixels is None else weight[:, None]
