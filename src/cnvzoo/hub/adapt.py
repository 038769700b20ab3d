"""A checkpoint's weights for other classes, or for images of other channels than it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.models import build_model
from cnvzoo.models.initialization import without_initialization

from .build import build_skeleton
from .errors import CheckpointError
from .tensors import fit_scale


def adapt(model: nn.Module, arguments: Mapping[str, Any], changes: Mapping[str, int], name: str) -> nn.Module:
    """The model with another `num_classes`, `in_chans`, or both; a warning says what is not the checkpoint's any more.

    The head, the layer whose shape depends on `num_classes`, is initialised anew, with the caller's random numbers, as
    any fresh model is. The first convolution is summed over its input channels for `in_chans=1`, else its channels are
    repeated in turn and rescaled, which keeps the response to a grey image.

    Args:
        model: of the checkpoint, with its weights.
        arguments: those of `build_model` that it was built with.
        changes: the arguments that are to be others.
        name: of the checkpoint, for the warning.

    Raises:
        ModelError: no model has these arguments.
        CheckpointError: the topology has no layer that could be adapted.
    """
    with nullcontext() if "num_classes" in changes else without_initialization():
        adapted = build_model(**{**arguments, **changes}).eval()
    state, said = model.state_dict(), []
    if "num_classes" in changes:
        heads = {_layer(tensor) for tensor in _reshaped(model, arguments, changes, "num_classes")}
        state |= {key: tensor for key, tensor in adapted.state_dict().items() if _layer_in(key, heads)}
        said.append(f"num_classes={changes['num_classes']}: {', '.join(sorted(heads))} is new, and has to be trained")
    convolutions = []
    if "in_chans" in changes:
        channels = changes["in_chans"]
        convolutions = _reshaped(model, arguments, changes, "in_chans")
        for key in convolutions:
            state[key] = adapt_input(state[key], channels)
        done = "summed over the channels" if channels == 1 else "repeated over the channels and rescaled"
        said.append(f"in_chans={channels}: the weights of {', '.join(map(_layer, convolutions))} are {done}")
    adapted.load_state_dict(state, strict=True)
    for key in convolutions:
        fit_scale(adapted, _layer(key))
    warnings.warn(f"{name} with {'; '.join(said)}", stacklevel=3)
    return adapted


def adapt_input(weight: Tensor, in_chans: int) -> Tensor:
    """A convolution's weight [out, in, kH, kW] for images of `in_chans` channels, as timm does it.

    The sum for one channel; else the channels in turn, times old over new number, so that the response to an image
    whose channels are equal stays the same where they divide.
    """
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)


def _reshaped(model: nn.Module, arguments: Mapping[str, Any], changes: Mapping[str, int], argument: str) -> list[str]:
    """Names of the tensors whose shape depends on this one argument; raises CheckpointError where adapt has no way."""
    other = build_skeleton({**arguments, argument: changes[argument]}).state_dict()
    own = model.state_dict()
    names = [name for name, tensor in other.items() if name in own and own[name].shape != tensor.shape]
    fit = own.keys() == other.keys() and names
    if argument == "in_chans":
        fit = fit and all(own[n].dim() == 4 and own[n][:, 0].shape == other[n][:, 0].shape for n in names)
    if not fit:
        raise CheckpointError(
            f"{argument}={changes[argument]}: {arguments['name']} has no layer that could be adapted to it: "
            f"leave it out, and {argument} is {arguments[argument]}, the checkpoint's"
        )
    return names


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _layer_in(tensor: str, layers: set[str]) -> bool:
    return any(tensor.startswith(f"{layer}.") for layer in layers)
