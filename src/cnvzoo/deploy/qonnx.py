"""A quantized model as QONNX: integers as float tensors with `Quant` nodes, which FINN and the qonnx package read.

Pappalardo et al. 2022, "QONNX: Representing Arbitrary-Precision Quantized Neural Networks" (arXiv:2206.07527). The
graph is Brevitas' own export, cleaned: constants folded, shapes inferred, tensors named. Only the image goes in
otherwise: as the pixels themselves, 0 to 255, and without the model's quantizer in front, since what has eight bits
already needs none. FINN v0.10 refuses an unsigned quantizer there, and later versions build one in hardware. The scale
of the pixels follows behind the first convolution, so that the operands of every convolution are integers.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.models.cnv import CNV

from .checks import quantized_cnv
from .errors import DeployError

OPSET = 13  # what FINN exports the models of its own tests with
QONNX_DOMAIN, QONNX_VERSION = "qonnx.custom_op.general", 1  # Quant and BipolarQuant are what they were in version 1
INPUT, OUTPUT = "global_in", "global_out"  # names that FINN expects


@torch.no_grad()
def qonnx_graph(model: nn.Module, in_chans: int, size: int) -> Any:
    """Pixels, 0 to 255, `global_in` [1, in_chans, size, size] to `global_out`, the logits [1, num_classes].

    Raises:
        DeployError: a float model, a layer or bit width that has no node in QONNX, or qonnx is not installed.
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
        warnings.simplefilter("ignore")  # the exporter's words about its own future
        from brevitas.export import export_qonnx

        path = Path(folder) / "model.onnx"
        export_qonnx(
            _on_pixels(net), args=torch.zeros(1, in_chans, size, size, device=device), export_path=str(path),
            opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], dynamo=False,
        )  # fmt: skip
        wrapped = cleanup_model(ModelWrapper(str(path)))
    wrapped.set_tensor_datatype(INPUT, DataType["UINT8"])
    wrapped.set_tensor_layout(INPUT, data_layout.NCHW)
    _declare_opsets(wrapped.model)
    return wrapped.model


def _check_layers(model: CNV) -> None:
    """All that computes has integers: FINN builds nothing else."""
    from brevitas.nn import QuantConv2d, QuantLinear, QuantReLU

    from cnvzoo.models.quant import quantizer_of

    known = (QuantConv2d, QuantLinear, QuantReLU, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d)
    for part, layers in (("features", model.features), ("classifier", model.classifier)):
        for name, layer in layers.named_children():
            if not isinstance(layer, known):
                raise DeployError(f"{part}.{name}: {type(layer).__name__} is not quantized, as all layers of QONNX are")
            if isinstance(layer, QuantReLU) and quantizer_of(layer).bits == 1:
                raise DeployError("1-bit activations of levels 0 and 1 have no node in QONNX: use a_bits of 2 or more")


class _Scale(nn.Module):
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _on_pixels(model: CNV) -> CNV:
    """A copy that takes pixels, with the quantizers as the exporter wants them."""
    from cnvzoo.models.quant import quantizer_of

    scale = quantizer_of(model.input).effective_scale()
    model = copy.deepcopy(model)
    for layer in model.modules():  # the exporter asks Brevitas' own tensors for scales and bit widths
        if hasattr(layer, "skip_create_quant_tensor"):
            layer.skip_create_quant_tensor = False  # type: ignore[assignment]
    model.input = nn.Identity()
    model.features[0] = nn.Sequential(model.features[0], _Scale(scale))
    return model


def _declare_opsets(model: Any) -> None:
    """ONNX's first: qonnx takes the first for ONNX's, and exporters differ in what they declare of the other."""
    from onnx import helper

    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(QONNX_DOMAIN, QONNX_VERSION)])
