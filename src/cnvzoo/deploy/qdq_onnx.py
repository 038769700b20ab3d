"""The ONNX graph of an integer net with QuantizeLinear and DequantizeLinear around float operators.

Most runtimes know this form: those that have integer kernels replace such operators by them. ONNX Runtime and OpenVINO
do so for every layer here. Levels have a scale of 1, so that the float tensors between layers hold whole numbers; the
multiplier of a channel is the scale of its weights and of its bias. What a layer computes is that of the integer graph,
but for the rounding of floats: sums of products are the same integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cnvzoo.deploy.graph_builder import GraphBuilder
from cnvzoo.deploy.integer import Head, IntegerNet, Layer, Rounding, Sum

INPUT, LOGITS = "image", "logits"
_LARGEST_LEVEL = 255


def qdq_graph(net: IntegerNet) -> onnx.ModelProto:
    """The graph of an integer net with QuantizeLinear and DequantizeLinear.

    Levels are uint8, and weights int8, also those of few bits. Runtimes need a zero point for weights: ONNX Runtime
    leaves a Gemm without one in float32. Levels of fewer than 8 bits are limited by a Clip of uint8 between
    QuantizeLinear and DequantizeLinear; a Clip of floats in front of these would keep ONNX Runtime from using integers.

    Returns:
        A model from uint8 `image` [N, in_chans, size, size] to float32 `logits` [N, classes].
    """
    graph = _NetWriter(net)
    image, head = net.image, net.head
    make = helper.make_tensor_value_info
    outputs = [make(LOGITS, TensorProto.FLOAT, ["N", len(head.weight)])]
    return graph.model(
        "cnvzoo_qdq", make(INPUT, TensorProto.UINT8, ["N", image.channels, image.size, image.size]), outputs
    )


class _NetWriter(GraphBuilder):
    """The nodes and constants of a net."""

    def __init__(self, net: IntegerNet) -> None:
        super().__init__((LOGITS,), compact=False)
        self._one = self.add_constant("one", np.float32(1))
        self._zero = self.add_constant("zero", np.uint8(0))
        self._shared: dict[str, str] = {}  # constants that several nodes take
        self._levels = [INPUT]  # the tensor of each node, uint8
        self._zero_points = [self._zero]
        self._flat = [False]  # whether it is [N, C] in place of [N, C, 1, 1]
        self._floats: dict[tuple[int, bool], str] = {}  # the levels as floats, by node and whether they are flat
        for node in net.nodes:
            if isinstance(node, Layer):
                self._add_layer(node)
            elif isinstance(node, Rounding):
                self._add_rounding(node)
            elif isinstance(node, Sum):
                self._add_sum(node)
        self._add_head(net.head)

    def _constant(self, name: str, value: Any) -> str:
        """A constant that is added once."""
        if name not in self._shared:
            self._shared[name] = self.add_constant(name, value)
        return self._shared[name]

    def _dequantized(self, position: int, *, flat: bool) -> str:
        """The levels of a node as floats: [N, features] if `flat`, else [N, channels, rows, columns]."""
        if (position, flat) not in self._floats:
            levels = self._levels[position]
            if flat and not self._flat[position]:
                levels = self.add("Flatten", [levels], f"{levels}.flat")
            elif self._flat[position] and not flat:
                shape = self._constant("pixels.shape", np.array([0, -1, 1, 1]))
                levels = self.add("Reshape", [levels, shape], f"{levels}.pixels")
            inputs = [levels, self._one, self._zero_points[position]]
            self._floats[position, flat] = self.add("DequantizeLinear", inputs, f"{levels}.float")
        return self._floats[position, flat]

    def _quantized(self, name: str, x: str, zero_point: str, high: int) -> str:
        """Floats as levels, limited to `high`."""
        x = self.add("QuantizeLinear", [x, self._one, zero_point], f"{name}.levels")
        if high == _LARGEST_LEVEL:
            return x
        return self.add("Clip", [x, "", self._constant(f"high.{high}", np.uint8(high))], f"{name}.clipped")

    def _added(self, levels: str, zero_point: str, *, flat: bool) -> None:
        self._levels.append(levels)
        self._zero_points.append(zero_point)
        self._flat.append(flat)

    def _weight(self, name: str, weight: NDArray[np.int8], scale: NDArray[np.float32]) -> str:
        """Weights [out, ...] times the scale of their channel."""
        inputs = [
            self.add_constant(f"{name}.weight", weight),
            self.add_constant(f"{name}.scale", scale),
            self.add_constant(f"{name}.zero", np.zeros(len(weight), np.int8)),
        ]
        return self.add("DequantizeLinear", inputs, f"{name}.weight.float", axis=0)

    def _bias(self, name: str, bias: NDArray[np.int32], scale: NDArray[np.float32]) -> str:
        inputs = [self.add_constant(f"{name}.bias", bias), self.add_constant(f"{name}.bias.scale", scale)]
        return self.add("DequantizeLinear", inputs, f"{name}.bias.float", axis=0)

    def _add_layer(self, layer: Layer) -> None:
        name, chosen, (taken,) = layer.name, layer.requantization, layer.inputs
        zero_point = self._zero if chosen.low == 0 else self._constant(f"half.{-chosen.low}", np.uint8(-chosen.low))
        weight = layer.scaled_weight
        if layer.linear:
            weight = weight.reshape(len(weight), -1)
        inputs = [
            self._dequantized(taken, flat=layer.linear),
            self._weight(name, weight, chosen.multiplier),
            self._bias(name, chosen.bias, chosen.multiplier),
        ]
        if layer.linear:
            x = self.add("Gemm", inputs, f"{name}.output", transB=1)
        else:
            x = self.add(
                "Conv", inputs, f"{name}.output", kernel_shape=weight.shape[2:], strides=layer.stride,
                pads=layer.padding * 2, group=layer.groups,
            )  # fmt: skip
        if layer.pooled:  # limited after the pool, to a quarter of the levels
            x = self.add("QuantizeLinear", [x, self._one, zero_point], f"{name}.unpooled")
            x = self.add("DequantizeLinear", [x, self._one, zero_point], f"{name}.unpooled.float")
            x = self.add("MaxPool", [x], f"{name}.largest", kernel_shape=[2, 2], strides=[2, 2])
        levels = self._quantized(name, x, zero_point, chosen.high - chosen.low)
        self._added(levels, zero_point, flat=layer.linear)

    def _add_rounding(self, node: Rounding) -> None:
        (taken,), chosen = node.inputs, node.requantization
        factor = self.add_constant(f"{node.name}.multiplier", chosen.multiplier.reshape(()))
        x = self.add("DequantizeLinear", [self._levels[taken], factor, self._zero], f"{node.name}.scaled")
        self._added(self._quantized(node.name, x, self._zero, chosen.high), self._zero, flat=self._flat[taken])

    def _add_sum(self, node: Sum) -> None:
        flat = self._flat[node.inputs[0]]
        x = self.add("Add", [self._dequantized(i, flat=flat) for i in node.inputs], f"{node.name}.total")
        self._added(self._quantized(node.name, x, self._zero, _LARGEST_LEVEL), self._zero, flat=flat)

    def _add_head(self, head: Head) -> None:
        """The logits; the scale of an average over pixels is that of a sum over them, times their number."""
        (taken,) = head.inputs
        if head.pixels is None:
            x = self._dequantized(taken, flat=True)
        else:
            x = self.add("GlobalAveragePool", [self._dequantized(taken, flat=False)], "average")
            x = self.add("Flatten", [x], "features")
        scale = np.full(len(head.weight), head.scale * (head.pixels or 1), np.float32)
        inputs = [x, self._weight(head.name, head.scaled_weight, scale)]
        if head.bias is not None:
            inputs.append(self._bias(head.name, head.bias, np.full(len(head.bias), head.scale, np.float32)))
        self.add("Gemm", inputs, LOGITS, transB=1)
