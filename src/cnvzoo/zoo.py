"""The library's front: models by name, what they cost, and training and evaluating them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.data import Dataset, DatasetInfo, Preprocessing, dataset_info, load_dataset
from cnvzoo.data import transforms as data_transforms
from cnvzoo.errors import ModelError
from cnvzoo.hub import (
    CheckpointConfig,
    CheckpointFacts,
    SeedResult,
    choose_checkpoint,
    load_checkpoint,
    parse_name,
    preprocessing_from,
)
from cnvzoo.models import ModelSpec, build_model, model_names, model_spec
from cnvzoo.models.initialization import without_initialization
from cnvzoo.train import (
    Recipe,
    RunRecord,
    count_correct,
    load_recipe,
    preprocessing_of,
    resolve_device,
    run_recipe,
)
from cnvzoo.train.device import deterministic
from cnvzoo.train.run import WEIGHTS as RUN_WEIGHTS


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


@dataclass(frozen=True)
class ModelInfo:
    """What a model costs.

    Attributes:
        name: of the model.
        summary: one line, with the source of the topology.
        input_shape: (channels, height, width) that `macs` is counted at.
        parameters: trainable numbers; quantized models have some scales more than their float twins.
        macs: multiply-accumulates of convolutions and linear layers for one image.
        weight_bytes: of convolution and linear weights, each at its bit width (32 for float), biases excluded.
    """

    name: str
    summary: str
    input_shape: tuple[int, int, int]
    parameters: int
    macs: int
    weight_bytes: int


def model_info(name: str, *, input_size: int | None = None, in_chans: int = 3, **arguments: Any) -> ModelInfo:
    """Count parameters, multiply-accumulates and weight bytes of a model.

    Args:
        name, in_chans, **arguments: as for `create_model`.
        input_size: height and width to count at; the only one that fits by default, else 32.
    """
    spec = model_spec(name)
    with without_initialization():
        model = build_model(name, in_chans=in_chans, **arguments).eval()
    size = input_size or spec.input_size or 32
    macs = weight_bits = 0

    def count(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal macs, weight_bits
        assert isinstance(layer.weight, Tensor)
        positions = output[0, 0].numel()  # of the output map; 1 for linear layers
        macs += layer.weight.numel() * positions
        weight_bits += layer.weight.numel() * _weight_bits(layer)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, in_chans, size, size))
    parameters = sum(p.numel() for p in model.parameters())
    return ModelInfo(name, spec.summary, (in_chans, size, size), parameters, macs, -(-weight_bits // 8))


def _weight_bits(layer: nn.Module) -> int:
    if not hasattr(layer, "weight_quant"):
        return 32
    from cnvzoo.models.quant import quantizer_of

    return quantizer_of(layer).bits


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
            `cnvzoo.train.run_recipe`, whose errors it raises.
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


@dataclass(frozen=True)
class Evaluation:
    """Top-1 of a model: `correct` of `total` images."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.total


def evaluate(
    model: nn.Module,
    dataset: str | Dataset,
    *,
    preprocessing: Preprocessing | None = None,
    device: str | torch.device = "auto",
    data_root: str | Path | None = None,
) -> Evaluation:
    """Score a model on a test set: float32, one crop, no augmentation.

    Args:
        model: images to logits; it is moved to `device` and left there, in the mode it was in.
        dataset: name, or a loaded dataset, of which the test set is used.
        preprocessing: of the images; by default the dataset's, for a model of this library, as in training.
        device: `auto`, or anything torch.device takes.
        data_root: where datasets are cached.

    Raises:
        ModelError: the model is not of this library and no preprocessing was given.
    """
    data = load_dataset(dataset, root=data_root) if isinstance(dataset, str) else dataset
    if preprocessing is None:
        spec = getattr(model, "spec", None)
        if not isinstance(spec, ModelSpec):
            raise ModelError(f"{type(model).__name__} is not a model of cnvzoo: give its preprocessing=")
        preprocessing = Preprocessing.for_dataset(data.info, size=spec.input_size, normalize=not spec.quantized)
    target = resolve_device(device)
    with deterministic(target):
        model.to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
        correct = count_correct(model, data.test_images, data.test_labels, preprocessing)
    return Evaluation(correct, len(data.test_labels))


def checkpoint_facts(
    record: RunRecord, others: Iterable[RunRecord] = (), *, recipes_scored: int | None = None
) -> CheckpointFacts:
    """What a checkpoint of a finished run says of itself.

    Args:
        record: of the run.
        others: the records of the recipe's other seeds.
        recipes_scored: how many recipes of the entry were ever scored on the test set, where that is known.
    """
    recipe = Recipe.model_validate(record.recipe)
    info = dataset_info(recipe.dataset)
    bits = {} if recipe.w_bits is None else {"w_bits": recipe.w_bits, "a_bits": recipe.a_bits}
    return CheckpointFacts(
        name=f"{recipe.tag}.{recipe.dataset}",
        model={"name": recipe.model, "num_classes": info.num_classes, "in_chans": info.in_chans, **bits},
        dataset=recipe.dataset,
        classes=list(info.classes),
        preprocessing=preprocessing_of(recipe.model, recipe.dataset).to_dict(),
        seed=record.seed,
        correct=record.correct,
        total=record.total,
        results=[
            SeedResult(
                seed=r.seed, correct=r.correct, total=r.total, weights_sha256=r.weights_sha256, numerics=r.numerics
            )
            for r in sorted((record, *others), key=lambda r: r.seed)
        ],
        weights_sha256=record.weights_sha256,
        recipe=record.recipe,
        versions=record.versions,
        device=record.device,
        commit=record.commit,
        numerics=record.numerics,
        recipes_scored=recipes_scored,
    )
