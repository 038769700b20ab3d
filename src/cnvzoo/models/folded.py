"""BatchNorm folded into the layers in front of it, for nets that only give outputs."""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of `model`, in evaluation mode, in which sequences have no BatchNorm behind a convolution or linear layer.

    What BatchNorm multiplies by is in the weights of that layer, what it adds in its bias: the outputs are the same to
    rounding, and a pass over each activation is saved. BatchNorm outside of an nn.Sequential stays.
    """
    folded = copy.deepcopy(model).eval()
    for sequence in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        for (_, layer), (name, norm) in pairwise(list(sequence.named_children())):
            if _fold(layer, norm):
                setattr(sequence, name, nn.Identity())
    return folded


def _fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Take `norm` into `layer`, if these are such layers."""
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        fuse = fuse_conv_bn_weights
    elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        fuse = fuse_linear_bn_weights
    else:
        return False
    assert norm.running_mean is not None
    assert norm.running_var is not None
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return True
