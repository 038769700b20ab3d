"""A quantized model as QONNX: integers as float tensors with `Quant` nodes, which FINN and the qonnx package read.

Pappalardo et al. 2022, "QONNX: Representing Arbitrary-Precision Quantized Neural Networks" (arXiv:2206.07527). The
graph is Brevitas' own export, cleaned: constants folded, shapes inferred, tensors named.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import DeployError

OPSET = 13  # what FINN's transformations are written for
INPUT, OUTPUT = "global_in", "global_out"  # names that FINN expects


@torch.no_grad()
def qonnx_graph(model: nn.Module, in_chans: int, size: int) -> Any:
    """Images scaled to [0, 1] `global_in` [1, in_chans, size, size] to `global_out`, the logits [1, num_classes].

    Raises:
        DeployError: a float model, or qonnx is not installed.
    """
    if not any(hasattr(layer, "weight_quant") for layer in model.modules()):
        raise DeployError("QONNX is for quantized models: use format='onnx' for a float model")
    from brevitas.nn import QuantReLU

    from cnvzoo.models.quant import quantizer_of

    if any(quantizer_of(layer).bits == 1 for layer in model.modules() if isinstance(layer, QuantReLU)):
        raise DeployError("1-bit activations of levels 0 and 1 have no node in QONNX: use a_bits of 2 or more")
    try:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.util.cleanup import cleanup_model
    except ImportError:
        raise DeployError("exporting to QONNX needs the qonnx package: pip install 'cnvzoo[export]'") from None
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's words about its own future
        from brevitas.export import export_qonnx

        model = copy.deepcopy(model)
        for layer in model.modules():  # the exporter asks Brevitas' own tensors for scales and bit widths
            if hasattr(layer, "skip_create_quant_tensor"):
                layer.skip_create_quant_tensor = False  # type: ignore[assignment]
        path = Path(folder) / "model.onnx"
        export_qonnx(
            model, args=torch.zeros(1, in_chans, size, size, device=device), export_path=str(path),
            opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], dynamo=False,
        )  # fmt: skip
        wrapped = cleanup_model(ModelWrapper(str(path)))
    return wrapped.model
