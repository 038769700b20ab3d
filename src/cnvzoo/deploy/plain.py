"""A float model as plain ONNX, for any runtime: float32, any batch size."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from .errors import DeployError

OPSET = 18


@torch.no_grad()
def plain_graph(model: nn.Module, in_chans: int, size: int) -> Any:
    """Normalised images `image` [N, in_chans, size, size] to `logits` [N, num_classes], both float32.

    Raises:
        DeployError: a quantized model.
    """
    if any(hasattr(layer, "weight_quant") for layer in model.modules()):
        raise DeployError("plain ONNX has no integers: export a quantized model with format='integer' or 'qonnx'")
    device = next(model.parameters()).device
    batch = torch.zeros(2, in_chans, size, size, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's words about its own future
        program = torch.onnx.export(
            model, (batch,), input_names=["image"], output_names=["logits"], opset_version=OPSET, dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model_proto
