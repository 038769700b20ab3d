"""The library's front: models by name, what they cost, and training and evaluating them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnvzoo.checkpoints.folder import preprocessing_from
from cnvzoo.checkpoints.format import CheckpointConfig
from cnvzoo.checkpoints.load import load_checkpoint, parse_name
from cnvzoo.checkpoints.locations import choose_checkpoint
from cnvzoo.data.datasets import DatasetInfo, dataset_info
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.preprocessing import transforms as data_transforms
from cnvzoo.errors import ModelError
from cnvzoo.models.layers import without_initialization
from cnvzoo.models.registry import build_model, model_names
from cnvzoo.training.evaluation import preprocessing_of
from cnvzoo.training.recipe import Recipe, load_recipe
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import WEIGHTS as RUN_WEIGHTS
from cnvzoo.training.run import run_recipe


def create_model(
    name: str,
    *,
    pretrained: bool | str = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    w_bits: int | None = None,
    a_bits: int | None = None,
    hub: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model on the CPU: freshly initialised and in training mode, or with published weights and in eval mode.

    Args:
        name: one of `list_models()`; with bit widths `quant_cnv_w4a4`; with a dataset too, `quant_cnv_w4a4.cifar10`,
            one of `list_checkpoints()`.
        pretrained: True for the weights of the checkpoint that is named, or else of the only one that fits; the name
            of a dataset for that of this dataset.
        num_classes: outputs, at least 1. By default those of the checkpoint or of the dataset in `name`, else 10. A
            checkpoint that is named gets a new head for other classes, to be trained; a warning says so.
        in_chans: image channels, at least 1. By default those of the checkpoint or of the dataset in `name`, else 3.
            The first convolution of a checkpoint that is named is adapted to others; a warning says so.
        w_bits, a_bits: bit widths of weights and activations, 1 to 8; quantized models need both, float models
            take neither.
        hub: where checkpoints are, see `load_checkpoint`.
        **kwargs: options of one model: `first_w_bits` (default 8) of `quant_cnv`.

    Returns:
        A module from images [N, in_chans, H, W] to logits [N, num_classes]. Float models expect images as
        `cnvzoo.transforms(dataset)` gives them, quantized ones the 8-bit image scaled to [0, 1]. One with published
        weights has its preprocessing with it: `cnvzoo.transforms(model)`; `model.pretrained_cfg` is all that is known.

    Raises:
        ModelError: an unknown name or option, bits out of range, missing, or given to a float model; no checkpoint
            that fits, or more than one.
        CheckpointError: a file of the checkpoint is missing or damaged.
    """
    parsed = parse_name(name)
    given = {"num_classes": num_classes, "in_chans": in_chans, "w_bits": w_bits, "a_bits": a_bits, **kwargs}
    wanted = parsed.bits | {key: value for key, value in given.items() if value is not None}
    if clash := [key for key, bits in parsed.bits.items() if wanted[key] != bits]:
        raise ModelError(f"{name} and {clash[0]}={wanted[clash[0]]}: leave {clash[0]} out, or the bits in the name")
    if not isinstance(pretrained, (bool, str)):
        raise ModelError(f"pretrained={pretrained!r}: True, or the name of a dataset; load_checkpoint takes folders")
    if not pretrained:
        info = dataset_info(parsed.dataset) if parsed.dataset else None
        shapes = {"num_classes": info.num_classes, "in_chans": info.in_chans} if info else {}
        return build_model(parsed.model, **(shapes | wanted))
    dataset = parsed.dataset
    if isinstance(pretrained, str):
        if dataset not in (None, pretrained):
            raise ModelError(f"{name} with pretrained={pretrained!r}: name one dataset")
        dataset = pretrained
    # a checkpoint that is named may be adapted to other classes and channels; else they are part of the choice
    adaptable = {key: wanted.pop(key) for key in ("num_classes", "in_chans") if dataset and key in wanted}
    checkpoint = choose_checkpoint(parsed.model, wanted, dataset, hub)
    return load_checkpoint(checkpoint, hub=hub, **adaptable)[0]


def list_models(pattern: str = "*") -> list[str]:
    """Names of models, those matching a shell pattern such as `resnet*`."""
    return model_names(pattern)


def quantize(
    float_model: nn.Module | str | Path,
    *,
    w_bits: int,
    a_bits: int,
    first_w_bits: int = 8,
    dataset: str | Preprocessing | None = None,
) -> nn.Module:
    """Start a quantized model from its float twin: the same weights, and scales that fit them.

    Args:
        float_model: a trained float CNV, or the folder of a checkpoint of one.
        w_bits, a_bits, first_w_bits: as for `create_model("quant_cnv", ...)`.
        dataset: what the float model was trained on, or its preprocessing; a checkpoint says so itself.

    Returns:
        A `quant_cnv`, in training mode, that takes the 8-bit image scaled to [0, 1]: train it further.

    Raises:
        ModelError: not a float CNV, or `dataset` is missing.
        CheckpointError: the folder is not a checkpoint.
    """
    from cnvzoo.models.cnv import CNV
    from cnvzoo.models.quant import start_from_float

    preprocessing = dataset
    if isinstance(float_model, (str, Path)):
        float_model, config = load_checkpoint(float_model)
        preprocessing = preprocessing or preprocessing_from(config)
    if preprocessing is None:
        raise ModelError("quantize needs dataset=: its mean and std become part of the first layer")
    if isinstance(preprocessing, str):
        preprocessing = preprocessing_of("cnv", preprocessing)
    if not isinstance(float_model, CNV) or not isinstance(float_model.input, nn.Identity):
        raise ModelError(f"only a float CNV has a quantized twin: {type(float_model).__name__} was given")
    weights = [m.weight for m in float_model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    channels = weights[0].shape[1]
    if len(preprocessing.mean) != channels:
        raise ModelError(
            f"the model takes {channels} channel(s) and the preprocessing has {len(preprocessing.mean)}: "
            "give the dataset that the model was trained on"
        )
    with without_initialization():
        model = build_model(
            "quant_cnv", num_classes=weights[-1].shape[0], in_chans=weights[0].shape[1],
            w_bits=w_bits, a_bits=a_bits, first_w_bits=first_w_bits,
        ).to(weights[0].device)  # fmt: skip
    start_from_float(model, float_model.state_dict(), preprocessing.mean, preprocessing.std)
    return model


def transforms(source: str | DatasetInfo | Preprocessing | CheckpointConfig | nn.Module) -> Any:
    """The torchvision v2 preprocessing for a user's own images: of a dataset, a checkpoint's config, or its model.

    A model that was adapted to other channels, 1 or 3, gets images of these, normalised by the mean over the channels.
    See `cnvzoo.data.transforms`.

    Raises:
        ModelError: a model that has no published weights, or of neither 1 nor 3 channels.
    """
    if isinstance(source, nn.Module):
        source = _preprocessing_of_model(source)
    return data_transforms(preprocessing_from(source) if isinstance(source, CheckpointConfig) else source)


def _preprocessing_of_model(model: nn.Module) -> Preprocessing:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, CheckpointConfig):
        raise ModelError(
            f"{type(model).__name__} was not created with published weights: give the dataset that it is for"
        )
    preprocessing = preprocessing_from(config)
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    if channels == preprocessing.in_chans:
        return preprocessing
    if channels not in (1, 3):
        raise ModelError(f"the model takes {channels} channels, and images have 1 or 3: convert yours in your own way")
    mean, std = ((sum(v) / len(v),) * channels for v in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, mean=mean, std=std)


@dataclass(frozen=True)
class Prediction:
    """One guess at an image: the class's name, and the probability that the model gives it."""

    label: str
    probability: float


@torch.inference_mode()
def predict(model: nn.Module, config: CheckpointConfig, image: Any, top: int = 5) -> list[Prediction]:
    """Classify one image.

    Args:
        model, config: as `load_checkpoint` gives them.
        image: PIL image, or uint8 tensor [C, H, W]; of any size.
        top: how many classes to return, the likeliest first.
    """
    device = next(model.parameters()).device
    probabilities = model(transforms(config)(image)[None].to(device)).softmax(1)[0]
    best = probabilities.topk(min(top, len(config.classes)))
    return [Prediction(config.classes[i], float(p)) for p, i in zip(*best, strict=True)]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the trained model in eval mode, and the record of the run."""

    model: nn.Module
    record: RunRecord


def train(
    recipe: Recipe | str | Path,
    *,
    run_dir: str | Path | None = None,
    float_start: str | Path | None = None,
    teacher: str | Path | Sequence[str | Path] | None = None,
    **options: Any,
) -> TrainResult:
    """Train a recipe and score it.

    Args:
        recipe: a Recipe, or the path of its YAML file.
        run_dir: where state, weights and record go, and from where an interrupted run goes on. Without it
            nothing is kept and nothing can be resumed.
        float_start: safetensors weights of the float twin, for recipes that start from one.
        teacher: safetensors weights of the teacher, for recipes that have one; one file for each if they have several.
        **options: seed, device, epochs, holdout, dataset, data_root, deadline, quiet: as for
            `cnvzoo.training.run_recipe`, whose errors it raises.
    """
    from safetensors.torch import load_file

    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(run_dir or temporary)
        record = run_recipe(recipe, run_dir=folder, float_start=float_start, teacher=teacher, **options)
        state = load_file(folder / RUN_WEIGHTS)
    info = dataset_info(recipe.dataset)
    with without_initialization():
        model = build_model(
            recipe.model, num_classes=info.num_classes, in_chans=info.in_chans,
            w_bits=recipe.w_bits, a_bits=recipe.a_bits,
        )  # fmt: skip
    model.load_state_dict(state, strict=True)
    return TrainResult(model.eval(), record)
