"""Models by name: create, train, quantize and save them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from cnvzoo.checkpoints.folder import preprocessing_from
from cnvzoo.checkpoints.format import CheckpointConfig
from cnvzoo.checkpoints.index import list_checkpoints, matches
from cnvzoo.checkpoints.load import load_checkpoint, parse_name
from cnvzoo.checkpoints.locations import choose_checkpoint
from cnvzoo.data.datasets import Dataset
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.published import dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.models.classifier import Classifier
from cnvzoo.models.cnv import CNV
from cnvzoo.models.layers import without_initialization
from cnvzoo.models.modes import unwrapped
from cnvzoo.models.registry import build_model, model_names
from cnvzoo.training.evaluation import preprocessing_of
from cnvzoo.training.recipe import Recipe, load_recipe
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import WEIGHTS as RUN_WEIGHTS
from cnvzoo.training.run import run_recipe
from cnvzoo.training.watch import EpochReport

if TYPE_CHECKING:
    pass


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
    """Build a model on the CPU: with random weights in training mode, or with published weights in eval mode.

    Args:
        name: a model of `list_models()`, such as `quant_cnv`; with bit widths, `quant_cnv_w4a4`; with a dataset,
            `quant_cnv_w4a4.cifar10`, a checkpoint of `list_checkpoints()`; or, with `pretrained=True`, the path of a
            checkpoint's folder: a Path, or text with a separator.
        pretrained: True loads the checkpoint that `name` says, or the only one that fits; the name of a dataset loads
            the checkpoint trained on it.
        num_classes: number of outputs, at least 1; default that of the checkpoint or of the dataset in `name`, else 10.
            If it differs from that of a named checkpoint, the head is new and untrained, with a warning.
        in_chans: number of image channels, at least 1; default that of the checkpoint or of the dataset in `name`,
            else 3. If it differs from that of a named checkpoint, the first convolution is adapted, with a warning.
        w_bits, a_bits: bit widths of weights and activations, 1 to 8; quantized models need both, float models take
            neither.
        hub: store of the checkpoints, see `load_checkpoint`.
        **kwargs: options of one model: `first_w_bits` (default 8) of `quant_cnv`.

    Returns:
        A module from images [N, in_chans, H, W] to logits [N, num_classes]. Float models take images normalised by
        `cnvzoo.transforms(dataset)`, quantized models take uint8 images divided by 255. What a model is travels with
        it: `arguments`, `classes` and `preprocessing` where the dataset is known, and `pretrained_cfg`, the config of
        its checkpoint; `cnvzoo.transforms(model)` is its preprocessing.

    Raises:
        ModelError: unknown name or option; bit widths out of range, missing, or given to a float model; no checkpoint
            fits, or several do.
        CheckpointError: a file of the checkpoint is missing or damaged.
    """
    if is_path(name):
        return _from_folder(name, pretrained, num_classes, in_chans, {"w_bits": w_bits, "a_bits": a_bits, **kwargs})
    parsed = parse_name(str(name))
    given = {"num_classes": num_classes, "in_chans": in_chans, "w_bits": w_bits, "a_bits": a_bits, **kwargs}
    wanted = parsed.bits | {key: value for key, value in given.items() if value is not None}
    if clash := [key for key, bits in parsed.bits.items() if wanted[key] != bits]:
        raise ModelError(f"{name} and {clash[0]}={wanted[clash[0]]}: leave {clash[0]} out, or the bits in the name")
    if not isinstance(pretrained, (bool, str)):
        raise ModelError(f"pretrained={pretrained!r}: True, or the name of a dataset; load_checkpoint takes folders")
    if not pretrained:
        info = dataset_info(parsed.dataset) if parsed.dataset else None
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
    # A checkpoint whose dataset is named may be adapted; without a dataset, classes and channels help to choose it.
    adaptable = {key: wanted.pop(key) for key in ("num_classes", "in_chans") if dataset and key in wanted}
    checkpoint = choose_checkpoint(parsed.model, wanted, dataset, hub)
    return load_checkpoint(checkpoint, hub=hub, **adaptable)[0]


def _from_folder(
    folder: str | Path, pretrained: bool | str, num_classes: int | None, in_chans: int | None, given: dict[str, Any]
) -> Classifier:
    if pretrained is not True:
        raise ModelError(f"{folder}: the folder of a checkpoint needs pretrained=True")
    model, config = load_checkpoint(folder, num_classes=num_classes, in_chans=in_chans)
    for key, value in given.items():
        if value is not None and value != config.model.get(key):
            raise ModelError(f"{folder}: its {key} is {config.model.get(key)}, not {value}: leave {key} out")
    return model


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
    dataset: Dataset | None = None,
    data_root: str | Path | None = None,
    float_start: str | Path | None = None,
    teacher: str | Path | Sequence[str | Path] | None = None,
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
        dataset: replaces the recipe's dataset, which is otherwise loaded from `data_root`.
        data_root: folder of cached datasets.
        float_start: safetensors weights of the float model, for a recipe with `float_start`.
        teacher: safetensors weights of the teacher, or one file for each teacher of the recipe, in its order.
        validate: score so many of the held-out images after each epoch, at most `holdout`. The weights are those of a
            run without validation.
        on_epoch: called with an `EpochReport` after each epoch. An exception that it raises stops the run, saves the
            state, and is raised.
        log: CSV file with a line for each epoch; a resumed run continues it.
        tensorboard: folder of event files for TensorBoard, which has to be installed.
        quiet: show no progress.

    Raises:
        As `cnvzoo.training.run_recipe`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(run_dir or temporary)
        record = run_recipe(
            recipe, run_dir=folder, seed=seed, device=device, epochs=epochs, holdout=holdout, deadline=deadline,
            dataset=dataset, data_root=data_root, float_start=float_start, teacher=teacher, validate=validate,
            on_epoch=on_epoch, log=log, tensorboard=tensorboard, quiet=quiet,
        )  # fmt: skip
        state = load_file(folder / RUN_WEIGHTS)
    info = dataset_info(recipe.dataset)
    with without_initialization():
        model = build_model(
            recipe.model, num_classes=info.num_classes, in_chans=info.in_chans,
            w_bits=recipe.w_bits, a_bits=recipe.a_bits,
        )  # fmt: skip
    model.load_state_dict(state, strict=True)
    return TrainResult(model.eval(), record)


def quantize(
    model: nn.Module | str | Path,
    *,
    w_bits: int,
    a_bits: int,
    first_w_bits: int = 8,
    dataset: str | Preprocessing | None = None,
) -> nn.Module:
    """Make a quantized model from a trained one: the same weights, with scales that fit them at the new bit widths.

    Args:
        model: a trained CNV, float or quantized, or the name or folder of its checkpoint.
        w_bits, a_bits, first_w_bits: as for `create_model("quant_cnv", ...)`.
        dataset: the dataset that the float model was trained on, or its preprocessing; needed for a float model
            that is not a checkpoint. A quantized model takes images without normalisation.

    Returns:
        A `quant_cnv` in training mode, which takes uint8 images divided by 255; train it further.

    Raises:
        ModelError: not a CNV, or `dataset` is missing or has other channels.
        CheckpointError: the folder is not a checkpoint.
    """
    from cnvzoo.models.quant import start_from_float  # Brevitas takes a second to import

    preprocessing = dataset
    if isinstance(model, (str, Path)):
        model, config = load_checkpoint(model)
        preprocessing = preprocessing or preprocessing_from(config)
    source = unwrapped(model)
    if not isinstance(source, CNV):
        raise ModelError(f"only a CNV can be quantized, not {type(source).__name__}")
    weights = [m.weight for m in source.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    channels = weights[0].shape[1]
    if not isinstance(source.input, nn.Identity):  # it is quantized, and takes images without normalisation
        mean, std = (0.0,) * channels, (1.0,) * channels
    elif preprocessing is None:
        raise ModelError("quantize needs dataset=: its mean and std become part of the first layer")
    else:
        if isinstance(preprocessing, str):
            preprocessing = preprocessing_of("cnv", preprocessing)
        mean, std = preprocessing.mean, preprocessing.std
    if len(mean) != channels:
        raise ModelError(
            f"the model takes {channels} channel(s) and the preprocessing has {len(mean)}: "
            "give the dataset that the model was trained on"
        )
    with without_initialization():
        quantized = build_model(
            "quant_cnv", num_classes=weights[-1].shape[0], in_chans=channels,
            w_bits=w_bits, a_bits=a_bits, first_w_bits=first_w_bits,
        ).to(weights[0].device, torch.float32)  # fmt: skip
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith(".scale")}
    start_from_float(quantized, state, mean, std)
    return quantized
