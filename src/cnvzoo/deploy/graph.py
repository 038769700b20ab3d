"""The integer net as an ONNX graph of operators that stock ONNX Runtime has fast kernels for.

QLinearConv with scales of 1 and zero points of 0 is exactly a convolution in int32, a bias, a float32 multiplier for
each channel, rounding half to even and saturation to 0..255; its per-channel weight scale is that multiplier. Clip
takes what is left down to a_bits, after the pool where there is one, which is the same and less work. Once a map is
one pixel, the batch takes the place of the pixels, so that the linear layers are matrix products over all images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .integer import HiddenLayer, IntegerNet
from .packing import pack

OPSET = 13
IR_VERSION = 8  # what onnxruntime 1.10 and later read
INPUT, ACCUMULATORS, SCALE = "image", "accumulators", "scale"

_BATCH_TO_PIXELS = [2, 1, 0, 3]  # [N, C, 1, 1] to [1, C, N, 1], and back


class _Graph:
    """Nodes and constants as they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.add_constant("one", np.float32(1))
        self.add_constant("zero", np.uint8(0))

    def add_constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def add_weight(self, name: str, weight: NDArray[np.int8]) -> str:
        packed = pack(weight)
        if packed is None:
            return self.add_constant(f"{name}.weight", weight)
        content, table = packed
        index = self.add("Cast", [self.add_constant(f"{name}.packed", content)], f"{name}.index", to=TensorProto.INT32)
        flat = self.add("Gather", [self.add_constant(f"{name}.table", table), index], f"{name}.gathered")
        if content.size * table.shape[1] != weight.size:
            flat = self.add("Reshape", [flat, self.add_constant(f"{name}.flat", np.array([-1]))], f"{name}.padded")
            ends = [self.add_constant(f"{name}.{key}", np.array([value])) for key, value in _ENDS(weight.size)]
            flat = self.add("Slice", [flat, *ends], f"{name}.values")
        shape = self.add_constant(f"{name}.shape", np.array(weight.shape))
        return self.add("Reshape", [flat, shape], f"{name}.weight")


def _ENDS(size: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("start", 0), ("end", size)


def integer_graph(net: IntegerNet) -> onnx.ModelProto:
    """uint8 images [N, in_chans, size, size] to `accumulators`, int32 [N, num_classes], and `scale`, float32."""
    graph = _Graph()
    x = INPUT
    on_pixels = False
    for layer in net.hidden:
        if layer.linear and not on_pixels:
            x = graph.add("Transpose", [x], "features", perm=_BATCH_TO_PIXELS)
            on_pixels = True
        x = _add_layer(graph, x, layer)
    x = graph.add("Transpose", [x], "pixels", perm=_BATCH_TO_PIXELS)
    x = graph.add("Flatten", [x], "flat")
    head = graph.add_weight("head", np.ascontiguousarray(net.head.T))
    graph.add("MatMulInteger", [x, head], ACCUMULATORS)
    graph.add("Constant", [], SCALE, value=numpy_helper.from_array(np.array(net.scale, np.float32)))
    make = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "cnvzoo_integer",
            [make(INPUT, TensorProto.UINT8, ["N", net.in_chans, net.size, net.size])],
            [
                make(ACCUMULATORS, TensorProto.INT32, ["N", len(net.head)]),
                make(SCALE, TensorProto.FLOAT, []),
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="cnvzoo",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _add_layer(graph: _Graph, x: str, layer: HiddenLayer) -> str:
    name, chosen = layer.name, layer.requantization
    inputs = [
        x, "one", "zero",
        graph.add_weight(name, layer.scaled_weight),
        graph.add_constant(f"{name}.multiplier", chosen.multiplier),
        graph.add_constant(f"{name}.zero", np.zeros(len(chosen.bias), np.int8)),
        "one", "zero",
        graph.add_constant(f"{name}.bias", chosen.bias),
    ]  # fmt: skip
    x = graph.add("QLinearConv", inputs, f"{name}.levels", kernel_shape=list(layer.weight.shape[2:]))
    if layer.pooled:
        x = graph.add("MaxPool", [x], f"{name}.pooled", kernel_shape=[2, 2], strides=[2, 2])
    if layer.high < np.iinfo(np.uint8).max:
        x = graph.add("Clip", [x, "", graph.add_constant(f"{name}.high", np.uint8(layer.high))], f"{name}.clipped")
    return x
