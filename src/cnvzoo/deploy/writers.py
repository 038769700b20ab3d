"""The ONNX graphs of the three formats: the integer graph and QONNX of a quantized CNV, plain ONNX of a float model."""

from __future__ import annotations

import copy
import itertools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from cnvzoo.deploy.integer import HiddenLayer, IntegerNet, quantized_cnv
from cnvzoo.models.cnv import CNV
from cnvzoo.models.quant import quantizer_of
from cnvzoo_runtime.metadata import DeployError

OPSET = 13
IR_VERSION = 8  # read by onnxruntime 1.10 and later
INPUT, ACCUMULATORS, SCALE = "image", "accumulators", "scale"
_BATCH_TO_PIXELS = [2, 1, 0, 3]  # [N, C, 1, 1] to [1, C, N, 1], and back

QONNX_OPSET = 13  # with which FINN exports the models of its own tests
QONNX_DOMAIN, QONNX_VERSION = "qonnx.custom_op.general", 1  # Quant and BipolarQuant are unchanged since version 1
QONNX_INPUT, QONNX_OUTPUT = "global_in", "global_out"  # names that FINN expects

FLOAT_OPSET = 18
_ROW_NODES_SIZE = 512  # bytes, about: of the two nodes that put rows of zeros back


def integer_graph(net: IntegerNet) -> onnx.ModelProto:
    """The integer graph, of operators for which ONNX Runtime has fast kernels.

    QLinearConv with scales of 1 and zero points of 0 is exactly a convolution in int32, plus a bias, times a float32
    multiplier for each channel, rounded half to even and saturated to 0..255; its per-channel weight scale is that
    multiplier. Clip then limits levels to a_bits; after the max pooling, which gives the same and is less work. Linear
    layers are 1x1 convolutions with the batch in the place of the height, so that each is one matrix product.

    Returns:
        A model from uint8 `image` [N, in_chans, size, size] to int32 `accumulators` [N, num_classes], and float32
        `scale`, a constant: logits are scale * accumulators.
    """
    graph = _GraphBuilder()
    x = INPUT
    is_transposed = False
    for layer in net.hidden:
        if layer.linear and not is_transposed:
            x = graph.add("Transpose", [x], "features", perm=_BATCH_TO_PIXELS)
            is_transposed = True
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


def _add_layer(graph: _GraphBuilder, x: str, layer: HiddenLayer) -> str:
    """Add the nodes of a layer with input `x`; returns the name of the output."""
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


class _GraphBuilder:
    """Collects the nodes and constants of a graph; each method returns the name of the tensor it adds."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.add_constant("one", np.float32(1))
        self.add_constant("zero", np.uint8(0))

    def add_constant(self, name: str, value: ArrayLike) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def add_weight(self, name: str, weight: NDArray[np.int8]) -> str:
        """An int8 weight; packed if that saves bytes, with the nodes that unpack it.

        Rows of zeros, which channels with a constant level have, are left out if that saves bytes too: among 1-bit
        weights, zero is a third value.
        """
        used = np.asarray(weight.reshape(len(weight), -1).any(1))
        rows, position = weight[used], _position(used)
        if not used.any() or _packed_size(rows) + position.nbytes + _ROW_NODES_SIZE >= _packed_size(weight):
            return self._add_packed(name, weight)
        stored = self._add_packed(f"{name}.used", rows)
        pads = np.zeros((2, weight.ndim), np.int64)  # before and after, for each axis
        pads[1, 0] = 1
        padded = self.add("Pad", [stored, self.add_constant(f"{name}.pads", pads.reshape(-1))], f"{name}.and_zeros")
        return self.add("Gather", [padded, self.add_constant(f"{name}.position", position)], f"{name}.weight")

    def _add_packed(self, name: str, weight: NDArray[np.int8]) -> str:
        packed = pack(weight)
        if packed is None:
            return self.add_constant(f"{name}.weight", weight)
        content, table = packed
        index = self.add("Cast", [self.add_constant(f"{name}.packed", content)], f"{name}.index", to=TensorProto.INT32)
        flat = self.add("Gather", [self.add_constant(f"{name}.table", table), index], f"{name}.gathered")
        if content.size * table.shape[1] != weight.size:
            flat = self.add("Reshape", [flat, self.add_constant(f"{name}.flat", np.array([-1]))], f"{name}.padded")
            slice_bounds = (("start", 0), ("end", weight.size))
            bounds = [self.add_constant(f"{name}.{key}", np.array([value])) for key, value in slice_bounds]
            flat = self.add("Slice", [flat, *bounds], f"{name}.values")
        shape = self.add_constant(f"{name}.shape", np.array(weight.shape))
        return self.add("Reshape", [flat, shape], f"{name}.weight")


def _position(used: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Where each row is among the used rows, followed by one row of zeros."""
    return np.where(used, np.cumsum(used) - 1, used.sum()).astype(np.int32)


def _packed_size(weight: NDArray[np.int8]) -> int:
    """Bytes of a weight in the file: of what `pack` returns, or of the weight itself."""
    packed = pack(weight)
    return weight.nbytes if packed is None else sum(part.nbytes for part in packed)


def pack(weight: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.int8]] | None:
    """Several weights in each byte: 8 of two values, 5 of three (2 bits), 3 of up to six, 2 of up to 16 (4 bits).

    A byte is the index of a row of a table that holds the weights as int8. So one Gather unpacks them, whose inputs are
    constant: ONNX Runtime computes it once, when it loads the file, and then runs as with int8 weights.

    Returns:
        (bytes [n], table int8 [rows, weights in a byte]): `table[bytes].reshape(-1)` starts with the weights in
        row-major order, and ends with padding. None for more than 16 values, which need a byte each.
    """
    values = np.unique(weight)
    count = max((n for n in range(1, 9) if len(values) ** n <= 256), default=1)
    if count == 1:
        return None
    table = np.array(list(itertools.product(values, repeat=count)), np.int8)
    digits = np.searchsorted(values, weight.reshape(-1))
    digits = np.pad(digits, (0, -len(digits) % count)).reshape(-1, count)
    powers = len(values) ** np.arange(count - 1, -1, -1)
    return (digits @ powers).astype(np.uint8), table


@torch.no_grad()
def qonnx_graph(model: nn.Module, in_chans: int, size: int) -> onnx.ModelProto:
    """The QONNX graph: float tensors of integer values with `Quant` nodes, which FINN and the qonnx package read.

    Pappalardo et al. 2022, "QONNX: Representing Arbitrary-Precision Quantized Neural Networks" (arXiv:2206.07527). It
    is Brevitas' own export, cleaned: constants folded, shapes inferred, tensors named. Only the input differs: pixels
    0 to 255 without a quantizer. FINN v0.10 refuses an unsigned quantizer there, and later versions build hardware for
    it. The division by 255 follows the first convolution, so that the operands of all convolutions are integers.

    Returns:
        A model from float32 `global_in` [1, in_chans, size, size], pixels from 0 to 255, to float32 `global_out`, the
        logits [1, num_classes].

    Raises:
        DeployError: a float model, a layer or bit width that QONNX has no node for, or qonnx is not installed.
    """
    net = quantized_cnv(model, "QONNX")
    _check_layers(net)
    try:
        from qonnx.core import data_layout
        from qonnx.core.datatype import DataType
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.util.cleanup import cleanup_model
    except ImportError:
        raise DeployError("exporting to QONNX needs the qonnx package: pip install 'cnvzoo[export]'") from None
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        from brevitas.export import export_qonnx

        path = Path(folder) / "model.onnx"
        export_qonnx(
            _on_pixels(net), args=torch.zeros(1, in_chans, size, size, device=device), export_path=str(path),
            opset_version=QONNX_OPSET, input_names=[QONNX_INPUT], output_names=[QONNX_OUTPUT], dynamo=False,
        )  # fmt: skip
        wrapped = cleanup_model(ModelWrapper(str(path)))
    wrapped.set_tensor_datatype(QONNX_INPUT, DataType["UINT8"])
    wrapped.set_tensor_layout(QONNX_INPUT, data_layout.NCHW)
    _declare_opsets(wrapped.model)
    return wrapped.model


def _check_layers(model: CNV) -> None:
    """Refuse layers without integers, which FINN cannot build."""
    from brevitas.nn import QuantConv2d, QuantLinear, QuantReLU

    known = (QuantConv2d, QuantLinear, QuantReLU, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d)
    for part, layers in (("features", model.features), ("classifier", model.classifier)):
        for name, layer in layers.named_children():
            if not isinstance(layer, known):
                raise DeployError(f"{part}.{name}: {type(layer).__name__} is not quantized, as all layers of QONNX are")
            if isinstance(layer, QuantReLU) and quantizer_of(layer).bits == 1:
                raise DeployError("QONNX has no node for 1-bit activations of levels 0 and 1: use a_bits of 2 or more")


def _on_pixels(model: CNV) -> CNV:
    """A copy of the model that takes pixels from 0 to 255."""
    scale = quantizer_of(model.input).effective_scale()
    model = copy.deepcopy(model)
    model.input = nn.Identity()
    model.features[0] = nn.Sequential(model.features[0], _Scale(scale))
    return model


class _Scale(nn.Module):
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _declare_opsets(model: onnx.ModelProto) -> None:
    """Declare ONNX's opset first, as qonnx expects, and QONNX's version, which exporters declare differently."""
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", QONNX_OPSET), helper.make_opsetid(QONNX_DOMAIN, QONNX_VERSION)])


@torch.no_grad()
def plain_graph(model: nn.Module, in_chans: int, size: int) -> onnx.ModelProto:
    """A float model as plain ONNX: float32, any batch size, for any runtime.

    Returns:
        A model from normalised images `image` [N, in_chans, size, size] to `logits` [N, num_classes].

    Raises:
        DeployError: a quantized model.
    """
    if any(hasattr(layer, "weight_quant") for layer in model.modules()):
        raise DeployError("format='onnx' is for float models: export a quantized model with 'integer' or 'qonnx'")
    device = next(model.parameters()).device
    batch = torch.zeros(2, in_chans, size, size, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            model, (batch,), input_names=["image"], output_names=["logits"], opset_version=FLOAT_OPSET, dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False,
        )  # fmt: skip
    assert program is not None
    model_proto = program.model_proto
    # the exporter's stack traces name files of this machine
    for part in (model_proto.graph, *model_proto.graph.node, *model_proto.graph.value_info):
        del part.metadata_props[:]
    return model_proto
