"""The weights that a run starts or learns from: a float start, teachers, or the model to fine-tune."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cnvzoo.data.datasets import Dataset
from cnvzoo.data.published import DatasetInfo
from cnvzoo.errors import ModelError
from cnvzoo.files import check_readable, sha256_of
from cnvzoo.models.initialization import initialized_from, without_initialization
from cnvzoo.models.modes import memory_format_of
from cnvzoo.models.registry import build_model, model_spec
from cnvzoo.models.resnet import ResNet, start_from_shallower
from cnvzoo.training.distillation import Teacher
from cnvzoo.training.evaluation import preprocessing_for
from cnvzoo.training.recipe import PUBLISHED_SEED, Recipe
from cnvzoo.training.state import RunError


@dataclass(frozen=True)
class StartingModel:
    """The checkpoint that a recipe's `start` names, for `run_recipe`.

    Attributes:
        checkpoint: name or path, as in the recipe.
        weights_sha256: sha256 of its weights file.
        build: makes the recipe's model with its weights for a dataset; what is new is initialised from torch's
            generator.
    """

    checkpoint: str
    weights_sha256: str
    build: Callable[[DatasetInfo], nn.Module]


def describe_inputs(recipe: Recipe, purpose: str, files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Entry, seed and sha256 of the weights given as float start or teachers, as in the record.

    Raises:
        RunError: a file is missing, or there is one too many.
    """
    entries = recipe.needs.get(purpose, ())
    inputs = []
    for entry, weights in itertools.zip_longest(entries, files):
        if entry is None:
            needs = f"learns from {', '.join(entries)}" if entries else f"has no {purpose}"
            raise RunError(f"{recipe.name} {needs}: {weights} is one file too many for {purpose}: leave it out")
        if weights is None or not Path(weights).is_file():
            verb = {"float_start": "starts from", "teacher": "learns from"}[purpose]
            raise RunError(
                f"{recipe.name} {verb} the weights of {entry}, seed {PUBLISHED_SEED}, and {weights or 'no file'} was "
                "given: train that entry first and give its weights.safetensors, "
                "or the model.safetensors of its checkpoint"
            )
        inputs.append({"entry": entry, "seed": PUBLISHED_SEED, "weights_sha256": sha256_of(weights)})
    return inputs


def initial_model(
    recipe: Recipe, data: Dataset, float_start: str | Path | None, start: StartingModel | None
) -> nn.Module:
    """The model as the seed initialises it, or with the weights that it starts from, in channels_last where it can be.

    Raises:
        RunError: the model cannot be built as the recipe says, for example because no layer has a name in `bits`, its
            state_dict has values that are not tensors, or the weights are not those that it starts from.
    """
    try:
        with initialized_from(recipe.seed):
            model = start.build(data.info).train() if start else build_model(
                recipe.model, num_classes=data.info.num_classes, in_chans=data.info.in_chans,
                **recipe.bit_widths,
            )  # fmt: skip
    except ModelError as error:
        raise RunError(f"{recipe.name}: {error}") from None
    _check_state(recipe, model)
    if recipe.float_start and recipe.float_start_model and float_start:
        with without_initialization():
            expected = build_model(
                recipe.float_start_model, num_classes=data.info.num_classes, in_chans=data.info.in_chans
            )
        state = _read_weights(recipe, float_start, expected, recipe.float_start)
        if isinstance(model, ResNet) and recipe.w_bits is None:
            start_from_shallower(model, state)
        else:
            from cnvzoo.models.quant_layers import start_from_float  # Brevitas takes a second to import

            normalisation = preprocessing_for(expected.spec, data.info)
            start_from_float(model, state, normalisation.mean, normalisation.std)
    return model.to(memory_format=memory_format_of(model))  # type: ignore[call-overload]


def _check_state(recipe: Recipe, model: nn.Module) -> None:
    """Raise RunError if a value of the model's state_dict is not a tensor, before an epoch is lost for it."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise RunError(
                f"{recipe.name}: {type(model).__name__}: {name} in its state_dict is of type {type(value).__name__}, "
                "and a run saves tensors alone: have get_extra_state return a tensor"
            )


def load_teacher(recipe: Recipe, data: Dataset, files: Sequence[str | Path], device: torch.device) -> Teacher | None:
    """The teachers with the weights in `files`, on the device; None for a recipe without a teacher."""
    nets = []
    for entry, name, weights in zip(recipe.teacher, recipe.teacher_models, files, strict=True):
        with without_initialization():
            model = build_model(name, num_classes=data.info.num_classes, in_chans=data.info.in_chans)
        model.load_state_dict(_read_weights(recipe, weights, model, entry), strict=True)
        nets.append((model.to(device), preprocessing_for(model_spec(name), data.info)))
    own = preprocessing_for(model_spec(recipe.model), data.info)
    return Teacher(nets, own, recipe.distillation) if nets else None


def _read_weights(recipe: Recipe, weights: str | Path, model: nn.Module, entry: str) -> dict[str, Tensor]:
    """The tensors of a file, which have to be those of `model`, the float net of `entry`."""
    _check_state(recipe, model)
    remedy = f"give the weights of {entry}"
    try:
        check_readable(weights)
        state = load_file(weights)
    except OSError as error:
        raise RunError(f"{recipe.name}: {weights}: cannot be read: {error.strerror}: {remedy}") from None
    except SafetensorError as error:
        raise RunError(f"{recipe.name}: {weights}: not a complete safetensors file: {error}: {remedy}") from None
    shapes, found = ({name: list(t.shape) for name, t in tensors.items()} for tensors in (model.state_dict(), state))
    if differing := [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]:
        name = differing[0]
        more = f" and {len(differing) - 1} other tensors" if len(differing) > 1 else ""
        raise RunError(
            f"{recipe.name}: {weights}: not the weights of {entry}: {name} is {found.get(name, 'missing')} and not "
            f"{shapes.get(name, 'expected')}{more}: {remedy}"
        )
    return state
