"""Train a recipe with datasets and checkpoints by name, and save the model as a checkpoint."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from cnvzoo.checkpoints.folder import check_weights, read_config
from cnvzoo.checkpoints.format import CONFIG, WEIGHTS, CheckpointConfig
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.checkpoints.locations import find_checkpoint, is_path
from cnvzoo.checkpoints.save import write_model
from cnvzoo.checkpoints.weights import build_empty
from cnvzoo.data.datasets import Dataset, is_dataset_path, load_dataset
from cnvzoo.data.image_folders import default_side
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.published import DatasetInfo, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.files import expanded
from cnvzoo.inference import known_preprocessing
from cnvzoo.models.classifier import Classifier
from cnvzoo.models.modes import unwrapped
from cnvzoo.models.registry import model_spec, with_defaults
from cnvzoo.training.evaluation import preprocessing_for
from cnvzoo.training.inputs import StartingModel
from cnvzoo.training.recipe import PUBLISHED_SEED, Recipe
from cnvzoo.training.recipe_file import load_recipe, recipe_from_dict
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import run_recipe
from cnvzoo.training.state import RUN_WEIGHTS, RunError, RunInterrupted
from cnvzoo.training.watch import EpochReport
from cnvzoo.zoo import quantize


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the trained model, in eval mode, and the record of the run."""

    model: Classifier
    record: RunRecord


def train(
    recipe: Recipe | str | Path,
    *,
    run_dir: str | Path | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    epochs: int | None = None,
    holdout: int = 0,
    deadline: float | None = None,
    dataset: Dataset | str | Path | None = None,
    data_root: str | Path | None = None,
    float_start: str | Path | None = None,
    teacher: str | Path | Sequence[str | Path] | None = None,
    start: str | Path | None = None,
    hub: str | Path | None = None,
    validate: int = 0,
    on_epoch: Callable[[EpochReport], object] | None = None,
    log: str | Path | None = None,
    tensorboard: str | Path | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a recipe and score the model.

    Args:
        recipe: a Recipe, a name of `list_recipes()`, or the path of a YAML file.
        run_dir: folder for state, weights and record, in which an interrupted run resumes. By default nothing is kept
            and nothing can be resumed.
        seed: replaces the recipe's; 0 to 2**63 - 1.
        device: `auto`, or anything torch.device takes.
        epochs: replaces the recipe's; any other number makes the run a trial.
        holdout: hold out this many training images and score on them instead of the test set.
        deadline: `time.monotonic()` at which to stop.
        dataset: replaces the recipe's dataset, as a name or a path of own images; or loaded images to use in its place.
            The float start and the teachers, which are entries of the recipe's own dataset, are left out with another
            one, by name, path or loaded; a warning says so.
        data_root: folder of cached datasets.
        float_start: weights of the float model, for a recipe with `float_start`: a safetensors file, or the name or
            folder of a checkpoint.
        teacher: weights of the teacher, or of each teacher of the recipe, in its order; likewise.
        start: replaces the recipe's `start` or `float_start`: the checkpoint to fine-tune.
        hub: store of the named checkpoints, see `load_checkpoint`.
        validate: score so many of the held-out images after each epoch, at most `holdout`. The weights are those of a
            run without validation.
        on_epoch: called with an `EpochReport` after each epoch. An exception that it raises stops the run, saves the
            state, and is raised.
        log: CSV file with a line for each epoch; a resumed run continues it.
        tensorboard: folder of event files for TensorBoard, which has to be installed.
        quiet: show no progress.

    Returns:
        The model, with the names of its classes and its preprocessing, and the record.

    Raises:
        As `cnvzoo.training.run_recipe`, RunError also where `run_dir` holds the finished run of another version of the
        model, with other tensors; and CheckpointError or ModelError where a checkpoint cannot be loaded, or is of
        another model than the recipe's, for a float start or a teacher also of another dataset or seed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe = _replaced(recipe, dataset, start)
    data = dataset if isinstance(dataset, Dataset) else None
    if data is None and is_dataset_path(recipe.dataset):
        data = _own_images(recipe)
    float_starts = _weights_files(recipe, "float_start", [] if float_start is None else [float_start], hub)
    teachers = [teacher] if isinstance(teacher, (str, Path)) else teacher or []
    teacher_files = _weights_files(recipe, "teacher", teachers, hub)
    with tempfile.TemporaryDirectory() as temporary:
        folder = expanded(run_dir or temporary)
        try:
            record = run_recipe(
                recipe, run_dir=folder, seed=seed, device=device, epochs=epochs, holdout=holdout, deadline=deadline,
                dataset=data, data_root=data_root,
                float_start=float_starts[0] if float_starts else None, teacher=teacher_files,
                start=_starting_model(recipe, hub) if recipe.start else None, validate=validate,
                on_epoch=on_epoch, log=log, tensorboard=tensorboard, quiet=quiet,
            )  # fmt: skip
        except RunInterrupted as error:
            if run_dir:
                raise
            raise error.without_folder() from error.__cause__
        state = load_file(folder / RUN_WEIGHTS)
    info = dataset_info(recipe.dataset) if data is None else data.info
    arguments = {"num_classes": info.num_classes, "in_chans": info.in_chans}
    model = build_empty({"name": recipe.model, **arguments, **recipe.bit_widths})
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError:  # a run that was finished before: its recipe names the model, and cannot tell its versions
        raise RunError(
            f"{folder}: holds the finished run of another version of {recipe.model}, with other tensors: give another "
            "run_dir, or move that folder away"
        ) from None
    model.classes, model.preprocessing = info.classes, preprocessing_for(model.spec, info)
    return TrainResult(model.eval(), record)


def _replaced(recipe: Recipe, dataset: Dataset | str | Path | None, start: str | Path | None) -> Recipe:
    """The recipe with another dataset or start, without the float start and the teachers that no longer fit.

    A warning names those that are left out because of another dataset.
    """
    changes: dict[str, Any] = {}
    if isinstance(dataset, Dataset):  # a held-out split has the name of its dataset, and own images never have
        name = dataset.info.name
        is_other = not is_dataset_path(recipe.dataset) and name != recipe.dataset
    else:
        name = recipe.dataset if dataset is None else _name_or_path(dataset)
        is_other = name != recipe.dataset
        changes |= {"dataset": name} if is_other else {}
    changes |= {} if start is None else {"start": _name_or_path(start)}
    without: dict[str, str] = {}
    if recipe.float_start and (is_other or start is not None):
        changes |= {"float_start": None, "float_start_sha256": None}
        without["float_start"] = recipe.float_start
    if recipe.teacher and is_other:
        changes |= {"teacher": [], "teacher_sha256": [], "distillation": {}}
        without["teacher"] = ", ".join(recipe.teacher)
    if is_other and without:
        left_out = " and ".join(f"{key} {entries}" for key, entries in without.items())
        warnings.warn(f"{recipe.name}: trains on {name} without {left_out}, of {recipe.dataset}", stacklevel=3)
    return recipe_from_dict(recipe.model_dump(mode="json") | changes, recipe.name) if changes else recipe


def _own_images(recipe: Recipe) -> Dataset:
    """The images at the path that the recipe names, those of a folder resized where the model takes another size."""
    size, folder = model_spec(recipe.model).input_size, expanded(recipe.dataset)
    if size is None or not folder.is_dir():
        return load_dataset(recipe.dataset)
    margin = size - default_side(folder)  # is padded, by the same number of pixels on each side
    return load_dataset(recipe.dataset, size=size if margin < 0 or margin % 2 else None)


def _name_or_path(source: str | Path) -> str:
    """As text; that of a Path has a separator, since `mnist` alone is a name."""
    text = str(source)
    return text if isinstance(source, str) or os.sep in text else os.path.join(os.curdir, text)


def _weights_files(recipe: Recipe, purpose: str, given: Sequence[str | Path], hub: str | Path | None) -> list[Path]:
    """The files for `float_start` or `teacher` of run_recipe: those that are given, and those of checkpoints.

    A float checkpoint's weights are the file of its run, byte for byte, so a record names the same sha256 for both.
    """
    models: Sequence[str] = recipe.teacher_models
    if purpose == "float_start":
        models = [recipe.float_start_model] if recipe.float_start_model else []
    files = [expanded(source) for source in given]
    for number, (source, model) in enumerate(zip(given, models, strict=False)):  # run_recipe refuses other counts
        folder = files[number]
        if folder.is_file() or folder.suffix == ".safetensors" or (is_path(source) and not folder.is_dir()):
            continue
        folder, config = _folder_and_config(source, hub)
        if (config.model["name"], config.dataset, config.seed) != (model, recipe.dataset_name, PUBLISHED_SEED):
            raise ModelError(
                f"{recipe.name}: {purpose}: {source} is a {config.model['name']} trained on {config.dataset or '?'} "
                f"with seed {'?' if config.seed is None else config.seed}: give the checkpoint of a {model} trained on "
                f"{recipe.dataset_name} with seed {PUBLISHED_SEED}"
            )
        check_weights(folder, config)
        files[number] = folder / WEIGHTS
    return files


def _folder_and_config(checkpoint: str | Path, hub: str | Path | None) -> tuple[Path, CheckpointConfig]:
    found = find_checkpoint(checkpoint, hub)
    return found.folder, read_config(found.folder, found.files[CONFIG] if found.files else None)


_BITS = {"name", "w_bits", "a_bits", "bits", "first_w_bits"}  # what `quantize` changes


def _starting_model(recipe: Recipe, hub: str | Path | None) -> StartingModel:
    """The checkpoint of the recipe's `start`, after checks."""
    checkpoint = str(recipe.start)
    folder, config = _folder_and_config(checkpoint, hub)
    spec = model_spec(recipe.model)
    wanted = with_defaults({"name": recipe.model, **recipe.bit_widths})
    differing = {
        key: value
        for key, value in with_defaults(config.model).items()
        if key not in ("num_classes", "in_chans") and value != wanted.get(key)
    }
    quantizable = spec.quantized and config.model["name"] in (recipe.model, spec.float_twin)
    if differing and not (quantizable and differing.keys() <= _BITS):
        options = ", ".join(f"{key}={value!r}" for key, value in differing.items() if key != "name")
        found = f"a {config.model['name']}" + (f" with {options}" if options and "name" not in differing else "")
        raise ModelError(
            f"{recipe.name}: start: {checkpoint} is {found}, and the recipe trains {recipe.tag}: name "
            "a checkpoint of the same model"
        )
    check_weights(folder, config)

    def build(info: DatasetInfo) -> nn.Module:
        with warnings.catch_warnings():  # the warning of an untrained last layer: the run trains it
            warnings.simplefilter("ignore")
            model, _ = load_checkpoint(checkpoint, hub=hub, num_classes=info.num_classes, in_chans=info.in_chans)
        return quantize(model, **recipe.bit_widths) if differing else model

    return StartingModel(checkpoint, config.file.sha256, build)


def save_checkpoint(
    model: nn.Module | TrainResult,
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> CheckpointConfig:
    """Write a model as a checkpoint folder: weights, config and card.

    `load_checkpoint(folder)` and `create_model(folder, pretrained=True)` read it, and `export`, `verify` and `publish`
    take it. It says only what is known: a model alone has no accuracy and no recipe, and a result has them.

    Args:
        model: a model of this library, or what `train` returned.
        folder: the folder to write, whose name is the checkpoint's: letters, digits, `_`, `-` and `.`.
        classes: names of the classes; default those that the model carries, else "0", "1", and so on.
        preprocessing: of the images; default that which the model carries.

    Returns:
        The config that was written.

    Raises:
        ModelError: not a model of this library, it does not know its preprocessing, or has another number of classes.
        CheckpointError: the folder's name is not that of a checkpoint, a file of something else in it would be
            replaced, a tensor is not a model's, or the model of a result was changed after its run.
        FileError: a file cannot be written.
    """
    record = model.record if isinstance(model, TrainResult) else None
    source = unwrapped(model.model if isinstance(model, TrainResult) else model)
    if not isinstance(preprocessing, (Preprocessing, type(None))):
        raise ModelError(f"preprocessing={preprocessing!r}: give a cnvzoo.Preprocessing")
    preprocessing = preprocessing or known_preprocessing(source, "give preprocessing=, or set model.preprocessing")
    return write_model(source, folder, classes=classes, preprocessing=preprocessing, record=record)
