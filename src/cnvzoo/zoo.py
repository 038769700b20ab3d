"""Models by name: list, create and quantize them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnvzoo.checkpoints.index import list_checkpoints, matches
from cnvzoo.checkpoints.load import load_checkpoint, parse_name
from cnvzoo.checkpoints.locations import choose_checkpoint, is_path, own_checkpoint
from cnvzoo.data.datasets import Dataset, is_dataset_path
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.published import dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.models.classifier import Classifier, LayerBits, check_layer_bits
from cnvzoo.models.initialization import without_initialization
from cnvzoo.models.modes import unwrapped
from cnvzoo.models.registry import (
    build_model,
    check_options,
    model_names,
    model_spec,
    quantized_twin,
    with_defaults,
)
from cnvzoo.training.evaluation import preprocessing_for, preprocessing_of


def list_models(
    pattern: str | Sequence[str] = "*", *, pretrained: bool = False, exclude: str | Sequence[str] = ()
) -> list[str]:
    """Names for `create_model`, those of your own models included.

    Args:
        pattern: shell pattern such as `resnet*`, or several, one of which has to match.
        pretrained: list the published checkpoints, such as `resnet20.cifar10`, instead of the models.
        exclude: patterns of names to leave out.
    """
    names = [row["name"] for row in list_checkpoints()] if pretrained else model_names()
    return [name for name in names if matches(name, pattern) and not matches(name, exclude)]


def create_model(
    name: str | Path,
    *,
    pretrained: bool | str = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    w_bits: int | None = None,
    a_bits: int | None = None,
    hub: str | Path | None = None,
    **kwargs: Any,
) -> Classifier:
    """Build a model: with random weights in training mode, or with published weights in eval mode.

    It is on the CPU, unless torch's default device was changed.

    Args:
        name: a model of `list_models()`, such as `quant_cnv`; with bit widths, `quant_cnv_w4a4`; with a dataset,
            `quant_cnv_w4a4.cifar10`, a checkpoint of `list_checkpoints()`; or, with `pretrained=True`, the name of a
            checkpoint of your own in `hub`, or the path of its folder: a Path, or text with a separator.
        pretrained: True loads the checkpoint that `name` says, or the only one that fits; the name of a dataset loads
            the checkpoint trained on it.
        num_classes: number of outputs, at least 1, or 0 for a model of this library without its last layer; default
            that of the checkpoint or of the dataset in `name`, else 10. If it differs from that of a named checkpoint,
            the last layer is new and untrained, with a warning.
        in_chans: number of image channels, at least 1; default that of the checkpoint or of the dataset in `name`,
            else 3. If it differs from that of a named checkpoint, the first convolution is adapted, with a warning.
        w_bits, a_bits: bit widths of weights and activations, 1 to 8; quantized models need both, float models take
            neither.
        hub: store of the checkpoints, see `load_checkpoint`.
        **kwargs: options of the model. Quantized ones have `first_w_bits`, of the first convolution's weights, 8 by
            default; and `bits`, other (w_bits, a_bits) of single layers, by the name of a layer or of a module around
            layers, or a shell pattern of names: `{"stages.2": (2, 4), "fc": (8, None)}`, where None is the model's own.
            Those of a registered model are further arguments of its builder.

    Returns:
        A module from images [N, in_chans, H, W] to logits [N, num_classes]. Float models take images normalised by
        `cnvzoo.transforms(dataset)`, quantized models take uint8 images divided by 255. What a model is travels with
        it: `arguments`, `classes` and `preprocessing` where the dataset is known, and `pretrained_cfg`, the config of
        its checkpoint; `cnvzoo.transforms(model)` is its preprocessing.

    Raises:
        ModelError: unknown name or option; bit widths out of range, missing, or given to a float model; no checkpoint
            fits, or several do.
        DatasetError: no such dataset as the one in the name.
        CheckpointError: a file of the checkpoint is missing or damaged.
    """
    if kwargs.get("bits") is not None:
        kwargs["bits"] = check_layer_bits(kwargs["bits"], str(name)) or None
    if is_path(name) or (pretrained is True and isinstance(name, str) and own_checkpoint(name, hub)):
        options = {"w_bits": w_bits, "a_bits": a_bits, **kwargs}
        return _from_folder(name, hub, pretrained, num_classes, in_chans, options)
    parsed = parse_name(str(name))
    given = {"num_classes": num_classes, "in_chans": in_chans, "w_bits": w_bits, "a_bits": a_bits, **kwargs}
    wanted = parsed.bits | {key: value for key, value in given.items() if value is not None}
    if clash := [key for key, bits in parsed.bits.items() if wanted[key] != bits]:
        raise ModelError(f"{name} and {clash[0]}={wanted[clash[0]]}: leave {clash[0]} out, or the bits in the name")
    if not isinstance(pretrained, (bool, str)) or pretrained == "":
        raise ModelError(f"pretrained={pretrained!r}: True, or the name of a dataset; load_checkpoint takes folders")
    if pretrained is False:
        info = None if parsed.dataset is None else dataset_info(parsed.dataset)
        shapes = {"num_classes": info.num_classes, "in_chans": info.in_chans} if info else {}
        model = build_model(parsed.model, **(shapes | wanted))
        if info is not None and model.in_chans == info.in_chans:
            model.preprocessing = preprocessing_for(model.spec, info)
            model.classes = info.classes if model.num_classes == info.num_classes else None
        return model
    dataset = parsed.dataset
    if isinstance(pretrained, str):
        if dataset not in (None, pretrained):
            raise ModelError(f"{name} with pretrained={pretrained!r}: name one dataset")
        dataset = pretrained
    shapes = {key: wanted.pop(key) for key in ("num_classes", "in_chans") if key in wanted}
    wanted = check_options(model_spec(parsed.model), wanted)
    # A checkpoint whose dataset is named may be adapted; without a dataset, classes and channels help to choose it.
    if dataset is None:
        return load_checkpoint(choose_checkpoint(parsed.model, shapes | wanted, hub=hub), hub=hub)[0]
    return load_checkpoint(choose_checkpoint(parsed.model, wanted, dataset, hub), hub=hub, **shapes)[0]


def _from_folder(
    folder: str | Path,
    hub: str | Path | None,
    pretrained: bool | str,
    num_classes: int | None,
    in_chans: int | None,
    given: dict[str, Any],
) -> Classifier:
    if pretrained is not True:
        raise ModelError(f"{folder}: the folder of a checkpoint needs pretrained=True")
    model, config = load_checkpoint(folder, hub=hub, num_classes=num_classes, in_chans=in_chans)
    arguments = with_defaults(config.model)
    options = {key: value for key, value in given.items() if value is not None}
    for key, value in check_options(model.spec, options).items():
        if value != arguments.get(key):
            raise ModelError(f"{folder}: its {key} is {arguments.get(key)}, not {value}: leave {key} out")
    return model


def quantize(
    model: nn.Module | str | Path,
    *,
    w_bits: int,
    a_bits: int,
    first_w_bits: int = 8,
    bits: LayerBits | None = None,
    dataset: str | Dataset | Preprocessing | None = None,
) -> Classifier:
    """Make a quantized model from a trained one: the same weights, with scales that fit them at the new bit widths.

    The first layer takes over the normalisation of the images. This is exact but for the border of images that a
    ResNet or a MobileNet pads: with black instead of the mean colour. Training makes up for that.

    Args:
        model: a trained model of this library that has a quantized twin, or is quantized, or the name or folder of its
            checkpoint.
        w_bits, a_bits, first_w_bits, bits: as for `create_model` with the name of the quantized model.
        dataset: the dataset that the float model was trained on, by name or loaded, or its preprocessing; needed for a
            float model that does not know its preprocessing. A quantized model takes images without normalisation.

    Returns:
        A quantized model in training mode, which takes uint8 images divided by 255; train it further.

    Raises:
        ModelError: no such model, its layers were changed or cannot be quantized, or `dataset` is missing or has other
            channels.
        CheckpointError: the folder is not a checkpoint.
    """
    from cnvzoo.models.quant_layers import start_from_float  # Brevitas takes a second to import

    preprocessing = dataset
    if isinstance(model, (str, Path)):
        model, _ = load_checkpoint(model)
    source = unwrapped(model)
    preprocessing = preprocessing or getattr(source, "preprocessing", None)
    if not isinstance(source, Classifier) or (twin := quantized_twin(source.spec)) is None:
        raise ModelError(
            f"{type(source).__name__} has no quantized twin: a model registered with quantized=True and float_twin="
        )
    channels, like = source.in_chans, next(source.parameters())
    if isinstance(preprocessing, (str, Path)) and is_dataset_path(preprocessing):
        raise ModelError(f"dataset={preprocessing!r}: load it: dataset=cnvzoo.load_dataset({preprocessing!r})")
    if isinstance(preprocessing, str):
        preprocessing = preprocessing_of(source.spec.name, preprocessing)
    elif isinstance(preprocessing, Dataset):
        preprocessing = preprocessing_for(source.spec, preprocessing.info)
    elif not isinstance(preprocessing, (Preprocessing, type(None))):
        raise ModelError(f"dataset={preprocessing!r}: the name of a dataset, a Dataset or a Preprocessing")
    if source.spec.quantized:  # it takes images without normalisation
        mean, std = (0.0,) * channels, (1.0,) * channels
    elif preprocessing is None:
        raise ModelError("quantize needs dataset=: its mean and std become part of the first layer")
    else:
        mean, std = preprocessing.mean, preprocessing.std
    if len(mean) != channels:
        raise ModelError(
            f"the model takes {channels} channel(s) and the preprocessing has {len(mean)}: "
            "give the dataset that the model was trained on"
        )
    kept = set(twin.options) - {"bits", "first_w_bits"}
    options: dict[str, Any] = {key: value for key, value in source.arguments.items() if key in kept}
    options |= {} if bits is None else {"bits": bits}
    if first_w_bits != 8 or "first_w_bits" in twin.options:  # a model registered by the user may not have it
        options["first_w_bits"] = first_w_bits
    with without_initialization():
        quantized = build_model(
            twin.name, num_classes=source.num_classes, in_chans=channels, w_bits=w_bits, a_bits=a_bits, **options
        ).to(like.device, torch.float32)
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith(".scale")}
    try:
        start_from_float(quantized, state, mean, std)
    except ModelError as error:  # of the topology
        raise ModelError(f"{source.spec.name} cannot be quantized as {twin.name}: {error}") from None
    except ValueError as error:
        raise ModelError(f"{source.spec.name} cannot be quantized after its layers were changed: {error}") from None
    own = preprocessing if isinstance(preprocessing, Preprocessing) else getattr(source, "preprocessing", None)
    if own is not None:  # a quantized model takes images without normalisation
        side = quantized.spec.input_size or own.size
        quantized.preprocessing = Preprocessing(side, (0.0,) * channels, (1.0,) * channels, own.native_size)
    quantized.classes = getattr(source, "classes", None)
    return quantized
