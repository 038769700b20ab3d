"""The ONNX graphs that torch's exporter makes: QONNX of a quantized model, and plain ONNX of a float model."""

from __future__ import annotations

import copy
import io
import logging
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import onnx
import torch
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from onnx import helper
from torch import Tensor, nn

from cnvzoo.deploy.lowering import quantized_calls
from cnvzoo.models.graph import LayerCall
from cnvzoo.models.norm_act import QuantizedResidualActivation
from cnvzoo.models.quant import IntQuantizer, PlainQuantIdentity, ResidualQuantReLU, act_quant, quantizer_of
from cnvzoo.models.residual import ADDEND
from cnvzoo_runtime.metadata import DeployError

QONNX_OPSET = 13  # with which FINN exports the models of its own tests
QONNX_DOMAIN, QONNX_VERSION = "qonnx.custom_op.general", 1  # Quant and BipolarQuant are unchanged since version 1
QONNX_INPUT, QONNX_OUTPUT = "global_in", "global_out"  # names that FINN expects

FLOAT_OPSET = 18

# What is printed is silenced for the whole process: two threads at once could leave it so.
_silence = threading.Lock()


@torch.no_grad()
def qonnx_graph(model: nn.Module, in_chans: int, size: int) -> onnx.ModelProto:
    """The QONNX graph: float tensors of integer values with `Quant` nodes, which FINN and the qonnx package read.

    Pappalardo et al. 2022, "QONNX: Representing Arbitrary-Precision Quantized Neural Networks" (arXiv:2206.07527). It
    is Brevitas' own export, cleaned: constants folded, shapes inferred, tensors named. Only the input differs: pixels
    0 to 255 without a quantizer. FINN v0.10 refuses an unsigned quantizer there, and later versions build hardware for
    it. The division by 255 follows the first convolution, so that the operands of all convolutions are integers. What
    is added to the output of a residual block has a signed `Quant` node of the scale of the sum.

    Returns:
        A model from float32 `global_in` [1, in_chans, size, size], pixels from 0 to 255, to float32 `global_out`, the
        logits [1, num_classes].

    Raises:
        DeployError: a float model, or a layer or bit width that QONNX has no node for.
    """
    from qonnx.core import data_layout
    from qonnx.core.datatype import DataType
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    calls = quantized_calls(model, "QONNX")
    _check_layers(calls)
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        from brevitas.export import export_qonnx

        path = Path(folder) / "model.onnx"
        export_qonnx(
            _exported(model, calls), args=torch.zeros(1, in_chans, size, size, device=device), export_path=str(path),
            opset_version=QONNX_OPSET, input_names=[QONNX_INPUT], output_names=[QONNX_OUTPUT], dynamo=False,
        )  # fmt: skip
        wrapped = cleanup_model(ModelWrapper(str(path)))
    wrapped.set_tensor_datatype(QONNX_INPUT, DataType["UINT8"])
    wrapped.set_tensor_layout(QONNX_INPUT, data_layout.NCHW)
    _declare_opsets(wrapped.model)
    return wrapped.model


def _check_layers(calls: Sequence[LayerCall]) -> None:
    """Refuse layers without integers, which FINN cannot build."""
    quantized = (QuantConv2d, QuantLinear, QuantReLU, QuantIdentity)
    for call in calls:
        if call.layer is None:
            continue
        if not isinstance(call.layer, (*quantized, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d)):
            raise DeployError(f"{call.name}: {type(call.layer).__name__} is not quantized, as all layers of QONNX are")
        if isinstance(call.layer, (QuantReLU, QuantIdentity)) and quantizer_of(call.layer).bits == 1:
            raise DeployError(
                f"{call.name}: QONNX has no node for 1-bit activations of levels 0 and 1: give it 2 bits or more, by "
                "a_bits or bits"
            )


def _exported(model: nn.Module, calls: Sequence[LayerCall]) -> nn.Module:
    """A copy of the model that takes pixels from 0 to 255, and has layers for all that its sums round."""
    first, after = calls[1], [call for call in calls if 1 in call.inputs]
    if not isinstance(first.layer, QuantIdentity) or quantizer_of(first.layer).learned or len(after) != 1:
        raise DeployError(f"{first.name}: QONNX needs a quantizer of the image here, before a single convolution")
    scale = quantizer_of(first.layer).effective_scale()
    model = copy.deepcopy(model)
    model.set_submodule(first.name, nn.Identity())
    layer = model.get_submodule(after[0].name)
    model.set_submodule(after[0].name, nn.Sequential(layer, _Scale(scale)))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ResidualQuantReLU):
            model.set_submodule(name, _RoundedSum(layer).eval())
    return model


class _RoundedSum(QuantizedResidualActivation):
    """A residual activation with a layer of its own that rounds the summands."""

    def __init__(self, relu: ResidualQuantReLU) -> None:
        super().__init__()
        scale = quantizer_of(relu).effective_scale()
        quantizer = IntQuantizer(8, signed=True, scale=float(scale), learned=False).to(scale.device)
        quantizer.ints = ADDEND
        injector: Any = type("Quant", (act_quant(quantizer),), {"signed": True, "narrow_range": False})
        self.summand = PlainQuantIdentity(act_quant=injector)
        self.relu = relu

    @property
    def activation_quantizer(self) -> IntQuantizer:  # type: ignore[override]
        return quantizer_of(self.relu)

    def forward(self, input: Tensor, residual: Tensor | None = None, *, rounded: bool = True) -> Any:
        if residual is None:
            return self.relu(input)
        return self.relu(self.summand(input) + (residual if rounded else self.summand(residual)))


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


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """A context in which PyTorch prints no deprecations and, when it fails, no code of the model's graph."""
    with _silence, warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


@torch.no_grad()
def plain_graph(model: nn.Module, in_chans: int, size: int) -> onnx.ModelProto:
    """A float model as plain ONNX: float32, any batch size, for any runtime.

    Returns:
        A model from normalised images `image` [N, in_chans, size, size] to `logits` [N, num_classes].

    Raises:
        DeployError: a quantized model, or one that PyTorch cannot express in ONNX.
    """
    if any(hasattr(layer, "weight_quant") for layer in model.modules()):
        raise DeployError(
            "format='onnx' is for float models: export a quantized model with 'integer', 'qdq' or 'qonnx'"
        )
    device = next(model.parameters()).device
    batch = torch.zeros(2, in_chans, size, size, device=device)
    try:
        with _silent_exporter():
            program = torch.onnx.export(
                model, (batch,), input_names=["image"], output_names=["logits"], opset_version=FLOAT_OPSET, dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error  # the first one says what is wrong, and the others what the exporter was doing
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise DeployError(
            f"PyTorch cannot export {type(model).__name__} to ONNX: {why}: change its forward, such as branches that "
            "depend on values"
        ) from cause
    assert program is not None
    model_proto = program.model_proto
    # the exporter's stack traces name files of this machine
    for part in (model_proto.graph, *model_proto.graph.node, *model_proto.graph.value_info):
        del part.metadata_props[:]
    return model_proto
