"""What the quantized formats ask of a model before they take it apart."""

from __future__ import annotations

import torch
from torch import nn

from cnvzoo.models.cnv import CNV

from .errors import DeployError


def quantized_cnv(model: nn.Module, graph: str) -> CNV:
    """The model, which is a `quant_cnv` with finite parameters; `graph` is what it is wanted for, in words.

    Raises:
        DeployError: another topology, a float model, or a parameter that is not finite.
    """
    if not isinstance(model, CNV):
        raise DeployError(
            f"{graph} is made of a quant_cnv, not of {type(model).__name__}: use format='onnx' for float models"
        )
    if isinstance(model.input, nn.Identity):
        raise DeployError("this CNV is a float model: quantize it (cnvzoo.quantize, then train), or use format='onnx'")
    bad = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise DeployError(f"{', '.join(bad[:3])}: not finite numbers; train the model again from an earlier state")
    return model
