"""Loading: from a checkpoint's name or path to its model, adapted to other classes or channels where asked.

Names are `<model>[_w<W>a<A>][.<dataset>]`, such as `quant_cnv_w4a4.cifar10`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.checkpoints.folder import preprocessing_from, read_model
from cnvzoo.checkpoints.format import CheckpointConfig, CheckpointError
from cnvzoo.checkpoints.locations import find_checkpoint, folder_hint
from cnvzoo.checkpoints.weights import build_empty, build_float32, build_skeleton, builder_errors, fit_scale
from cnvzoo.errors import ModelError
from cnvzoo.models.classifier import OR_NO_HEAD, Classifier, check_count
from cnvzoo.models.initialization import without_initialization
from cnvzoo.models.registry import model_names, model_spec

_BITS = re.compile(r"(.+)_w(\d)a(\d)", re.ASCII)


@dataclass(frozen=True)
class ModelName:
    """The parts of a name.

    Attributes:
        model: name of the registered model.
        bits: w_bits and a_bits, where the name has them; else empty.
        dataset: name of the dataset, or None.
    """

    model: str
    bits: dict[str, int]
    dataset: str | None


def parse_name(name: str) -> ModelName:
    """The parts of a name. Raises ModelError where its model is not registered."""
    if not isinstance(name, str):
        raise ModelError(f"the name of a model is text, not {name!r}")
    tag, dot, dataset = name.partition(".")
    match = _BITS.fullmatch(tag)
    if tag in model_names() or match is None:
        model, bits = tag, {}
    else:
        model, bits = match[1], {"w_bits": int(match[2]), "a_bits": int(match[3])}
    if model not in model_names() and (hint := folder_hint(name)):
        raise ModelError(f"unknown model {name!r}: {hint}")
    return ModelName(model_spec(model).name, bits, dataset if dot else None)


def load_checkpoint(
    checkpoint: str | Path,
    *,
    hub: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
) -> tuple[Classifier, CheckpointConfig]:
    """Build the model of a checkpoint, in eval mode on the CPU, with its weights.

    Size and sha256 of a file are compared before anything in it is parsed: with the index inside this package, or, for
    a checkpoint that is not published, with its own config.json.

    Args:
        checkpoint: a name, such as `cnv.mnist`; or the path of a folder, as a Path or as text with a separator.
        hub: the store of named checkpoints: a directory or `hf://ORGANISATION`; default `CNVZOO_HUB`, else the
            checkout's own `hub/`, else the Hugging Face Hub.
        num_classes: number of classes. Other than the checkpoint's, the last layer is new and untrained; a warning says
            so. 0 leaves the last layer out, without a warning: the output is [N, head_hidden_size], what it would take.
        in_chans: channels of the images. Other than the checkpoint's, the first convolution is adapted; a warning says
            so.

    Returns:
        The model and its config, which is also the model's attribute `pretrained_cfg`. A model that was adapted has no
        `pretrained_cfg`; the config that is returned then says what is known about the new model: it has the name of
        its topology, no results, and, with other classes, no dataset and numbers as their names.

    Raises:
        CheckpointError: a file is missing or damaged, its tensors are not exactly the model's, or the builder of a
            model of your own fails for these classes or channels.
        ModelError: no model has these classes or channels, or a model of your own cannot be without its last layer.
    """
    found = find_checkpoint(checkpoint, hub)
    model, config = read_model(found.folder, found.files)
    wanted = {
        "num_classes": None if num_classes is None else check_count("num_classes", num_classes, OR_NO_HEAD, least=0),
        "in_chans": None if in_chans is None else check_count("in_chans", in_chans, "an image has at least 1 channel"),
    }
    changes = {key: value for key, value in wanted.items() if value is not None and value != config.model[key]}
    if changes:
        name, config = config.name, _adapted_config(config, changes)
        reshaped = {key: value for key, value in changes.items() if value}
        model = adapt(model, model.arguments, reshaped, name) if reshaped else model
        if changes.get("num_classes") == 0:
            model = _without_head(model)
    channels = config.model["in_chans"]
    model.classes = None if "num_classes" in changes else tuple(config.classes)
    model.preprocessing = preprocessing_from(config) if channels in (1, 3) else None
    model.pretrained_cfg = None if changes else config
    return model, config


def _adapted_config(config: CheckpointConfig, changes: Mapping[str, int]) -> CheckpointConfig:
    """The config of a model that was adapted: nothing in it is about the checkpoint's weights or classes."""
    arguments, preprocessing = {**config.model, **changes}, config.preprocessing
    known: dict[str, Any] = {"dataset": config.dataset, "classes": config.classes}
    if "num_classes" in changes:
        known = {"dataset": None, "classes": [str(n) for n in range(changes["num_classes"])]}
    if "in_chans" in changes:
        mean, std = (
            [sum(preprocessing[key]) / len(preprocessing[key])] * changes["in_chans"] for key in ("mean", "std")
        )
        preprocessing = {**preprocessing, "mean": mean, "std": std}
    unknown = {"seed": None, "correct": None, "total": None, "weights_sha256": None, "commit": None, "numerics": None}
    unknown |= {"recipes_scored": None, "trial": None, "integer": None, "results": []}
    unknown |= {"recipe": {}, "versions": {}, "device": {}}
    name = config.name.partition(".")[0]
    return config.model_copy(
        update={"name": name, "model": arguments, "preprocessing": preprocessing} | known | unknown
    )


def _without_head(model: Classifier) -> Classifier:
    """The model, in eval mode, without its last layer."""
    name = model.spec.name
    if not model.spec.headless:
        if isinstance(model, Classifier):
            with suppress(NotImplementedError):
                model.reset_classifier(0)
                return model
        raise ModelError(
            f"num_classes=0: {name} cannot be without its last layer: register it with headless=True, or leave "
            "num_classes out"
        )
    bare, state = build_empty({**model.arguments, "num_classes": 0}), model.state_dict()
    if other := [key for key, t in bare.state_dict().items() if key not in state or state[key].shape != t.shape]:
        raise ModelError(f"num_classes=0: {name} without its last layer has other tensors: {', '.join(other)}")
    bare.load_state_dict({key: state[key] for key in bare.state_dict()}, strict=True)
    return bare.eval()


def adapt(model: nn.Module, arguments: Mapping[str, Any], changes: Mapping[str, int], name: str) -> Classifier:
    """The model with other `num_classes`, `in_chans` or both; a warning names the layers that changed.

    The last layer, whose shape depends on `num_classes`, is initialised anew from the global random number generator.
    The first convolution is adapted by `adapt_input`.

    Args:
        model: the checkpoint's model with its weights.
        arguments: the arguments of `build_model` that it was built with, `name` included.
        changes: the arguments that change, with their new values.
        name: name of the checkpoint, for the warning.

    Raises:
        ModelError: no model has these arguments.
        CheckpointError: the topology has no layer that could be adapted, or its builder fails.
    """
    wanted = ", ".join(f"{argument}={value}" for argument, value in changes.items())
    initialization = nullcontext() if "num_classes" in changes else without_initialization()
    with builder_errors(f"{wanted}: {name}"), initialization:
        adapted = build_float32({**arguments, **changes}).eval()
    tensors, notes, convolutions = model.state_dict(), [], []
    if "num_classes" in changes:
        heads = {_layer(tensor) for tensor in _reshaped(model, arguments, changes, "num_classes")}
        tensors |= {key: tensor for key, tensor in adapted.state_dict().items() if _layer_in(key, heads)}
        notes.append(f"num_classes={changes['num_classes']}: {', '.join(sorted(heads))} is new and untrained")
    if "in_chans" in changes:
        channels = changes["in_chans"]
        convolutions = _reshaped(model, arguments, changes, "in_chans")
        for key in convolutions:
            tensors[key] = adapt_input(tensors[key], channels)
        change = "summed over the channels" if channels == 1 else "repeated over the channels and rescaled"
        notes.append(f"in_chans={channels}: the weights of {', '.join(map(_layer, convolutions))} are {change}")
    adapted.load_state_dict(tensors, strict=True)
    for key in convolutions:
        fit_scale(adapted, _layer(key))
    warnings.warn(f"{name} with {'; '.join(notes)}", stacklevel=3)
    return adapted


def adapt_input(weight: Tensor, in_chans: int) -> Tensor:
    """A convolution's weight [out, in, kH, kW] for images of `in_chans` channels, as timm's `adapt_input_conv` does it.

    The sum over the channels for `in_chans=1`. Else the channels are repeated in turn and multiplied by old / new
    number: where the new number is a multiple, the response to an image with equal channels stays the same.
    """
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)


def _reshaped(model: nn.Module, arguments: Mapping[str, Any], changes: Mapping[str, int], argument: str) -> list[str]:
    """Names of the tensors whose shape depends on `argument`. Raises CheckpointError where they cannot be adapted."""
    other = build_skeleton({**arguments, argument: changes[argument]}).state_dict()
    own = model.state_dict()
    names = [name for name, tensor in other.items() if name in own and own[name].shape != tensor.shape]
    adaptable = own.keys() == other.keys() and names
    if argument == "in_chans":
        adaptable = adaptable and all(own[n].dim() == 4 and own[n][:, 0].shape == other[n][:, 0].shape for n in names)
    if not adaptable:
        raise CheckpointError(
            f"{argument}={changes[argument]}: {arguments['name']} has no layer that could be adapted: leave {argument} "
            f"out, and it is the checkpoint's {arguments[argument]}"
        )
    return names


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _layer_in(tensor: str, layers: set[str]) -> bool:
    return any(tensor.startswith(f"{layer}.") for layer in layers)
