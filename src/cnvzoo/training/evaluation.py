"""Accuracy on a test set: one crop, no augmentation, in the dtype of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.data.datasets import Dataset, is_dataset_path, load_dataset
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.published import DatasetInfo, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.files import expanded
from cnvzoo.models.classifier import Classifier, class_names
from cnvzoo.models.modes import dtype_of, evaluating, moved, unwrapped
from cnvzoo.models.registry import ModelSpec, model_spec
from cnvzoo.progress import counted
from cnvzoo.training.device import deterministic, resolve_device


def preprocessing_of(model: str, dataset: str) -> Preprocessing:
    """Preprocessing of a dataset's images for a model: quantized models take uint8 / 255, others normalised images.

    Args:
        model: name of a model, without bits.
        dataset: name of a dataset of the benchmark.

    Raises:
        ModelError: no such model.
        DatasetError: no such dataset, or its images cannot be padded to the size that the model takes.
    """
    return preprocessing_for(model_spec(model), dataset_info(dataset))


def preprocessing_for(spec: ModelSpec, info: DatasetInfo) -> Preprocessing:
    """As `preprocessing_of`, for any dataset, given what the names stand for."""
    return Preprocessing.for_dataset(info, size=spec.input_size, normalize=not spec.quantized)


def preprocessing_of_model(model: nn.Module, info: DatasetInfo, remedy: str) -> Preprocessing:
    """Preprocessing of a dataset's images for a model of this library.

    Mean and standard deviation are those that the model was trained with, where it knows them.

    Args:
        model: the model.
        info: the dataset.
        remedy: what the caller takes in place of a model of this library, for the error.

    Raises:
        ModelError: not a model of this library, or it takes images of another number of channels.
    """
    spec, own = getattr(model, "spec", None), getattr(model, "preprocessing", None)
    if not isinstance(spec, ModelSpec):
        raise ModelError(f"{type(model).__name__} is not a model of cnvzoo: {remedy}")
    found = preprocessing_for(spec, info)
    channels = own.in_chans if isinstance(own, Preprocessing) else getattr(model, "in_chans", info.in_chans)
    if channels != info.in_chans:
        raise ModelError(f"the model takes {channels} channel(s), and the images of {info.name} have {info.in_chans}")
    if not isinstance(own, Preprocessing):
        return found
    return replace(found, mean=own.mean, std=own.std)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of a model on a test set of N images and K classes.

    Attributes:
        predictions: class with the largest logit of each image, int64 [N].
        labels: the right classes, int64 [N].
        top5_correct: number of images whose class is among the five of the largest logits; of equal logits, the one of
            the lower class counts as larger. A logit that is not a number counts as the largest.
        num_classes: K.
    """

    predictions: Tensor
    labels: Tensor
    top5_correct: int
    num_classes: int

    @classmethod
    def of_logits(cls, logits: Tensor, labels: Tensor) -> Evaluation:
        """From logits [N, K] and labels [N]."""
        labels = labels.long()
        predictions = logits.argmax(1)
        logits = logits.nan_to_num(math.inf, math.inf, -math.inf)  # argmax takes NaN for the largest too
        own = logits.gather(1, labels[:, None])
        lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & lower)).sum(1)
        return cls(predictions, labels, int((rank < 5).sum()), logits.shape[1])

    @property
    def correct(self) -> int:
        """Number of images classified right."""
        return int((self.predictions == self.labels).sum())

    @property
    def total(self) -> int:
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Top-1 in percent."""
        return 100 * self.correct / self.total

    @property
    def top5_accuracy(self) -> float:
        """In percent."""
        return 100 * self.top5_correct / self.total

    def confusion_matrix(self) -> Tensor:
        """Number of images of each class (row) that were classified as each class (column), int64 [K, K]."""
        cells = self.labels * self.num_classes + self.predictions
        return torch.bincount(cells, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)


def evaluate(
    model: nn.Module,
    dataset: str | Path | Dataset,
    *,
    preprocessing: Preprocessing | None = None,
    device: str | torch.device = "auto",
    data_root: str | Path | None = None,
) -> Evaluation:
    """Score a model on the test set of a dataset: one crop, no augmentation, in the dtype of the model's weights.

    Args:
        model: maps images [B, C, H, W] to logits [B, K]. It is left as it was: in mode, device and memory
            layout. The wrappers of torch.compile and DataParallel are not used.
        dataset: name of a dataset or path of own images, as for `load_dataset`, or a loaded one. Images of a folder are
            resized and converted to what the model was trained on, where that is known.
        preprocessing: from uint8 images to the model's inputs; by default that of training, for models of this library.
        device: `auto`, or anything torch.device takes.
        data_root: folder of the dataset cache.

    Raises:
        ModelError: the model is not from this library and no preprocessing was given, it has other classes or another
            number of channels than the dataset, or it does not return logits.
        DatasetError: the dataset cannot be loaded, or its images cannot be padded to the size that the model takes.
        CnvzooError: the device is not available.
    """
    if not isinstance(preprocessing, (Preprocessing, type(None))):
        raise ModelError(f"preprocessing={preprocessing!r}: give a cnvzoo.Preprocessing")
    model = unwrapped(model)
    own = preprocessing or getattr(model, "preprocessing", None)
    if isinstance(dataset, Dataset):
        data = dataset
    elif isinstance(own, Preprocessing) and is_dataset_path(dataset) and expanded(dataset).is_dir():
        data = load_dataset(dataset, size=own.native_size, in_chans=own.in_chans)
    else:
        data = load_dataset(dataset, root=data_root)
    preprocessing = preprocessing or preprocessing_of_model(model, data.info, "give its preprocessing=")
    if preprocessing.in_chans != data.info.in_chans:
        raise ModelError(
            f"the preprocessing is for images of {preprocessing.in_chans} channel(s), and {data.info.name} has "
            f"{data.info.in_chans}: give one for its images"
        )
    if isinstance(model, Classifier):  # before any image is classified; other models are checked by their logits
        _check_classes(model.num_classes, data.info)
        check_class_names("the model", class_names(model, model.num_classes), data.info)
    target = resolve_device(device)
    with deterministic(target), moved(model, target), evaluating(model), torch.inference_mode():
        logits = []
        for start in counted(range(0, len(data.test_images), _BATCH), "evaluating"):
            images = preprocessing(data.test_images[start : start + _BATCH].to(target)).to(dtype_of(model))
            found = checked_logits(model(images), len(images))
            _check_classes(found.shape[1], data.info)
            logits.append(found.float().cpu())
    return Evaluation.of_logits(torch.cat(logits), data.test_labels)


def checked_logits(found: Any, images: int) -> Tensor:
    """What a model returned for so many images. Raises ModelError if it is not a tensor of logits [images, K]."""
    if isinstance(found, Tensor) and found.ndim == 2 and len(found) == images:
        return found
    what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise ModelError(
        f"the model returns {what} for {images} image(s), not logits [{images}, K]: give a module that returns these"
    )


_BATCH = 1000
_NAMED = 5  # classes that an error names


def check_class_names(model: str, classes: Sequence[str], info: DatasetInfo) -> None:
    """Raise ModelError if a dataset has other classes than a model, or in another order, where both are known.

    Args:
        model: how the message names the model.
        classes: those of the model, as many as the dataset has.
        info: of the dataset.
    """
    unknown = tuple(map(str, range(info.num_classes)))
    if tuple(classes) != info.classes and unknown not in (tuple(classes), info.classes):
        raise ModelError(
            f"{model} is for the classes {_listed(classes)}, and {info.name} has {_listed(info.classes)}: evaluate it "
            "on its own classes, in its order"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _check_classes(outputs: int, info: DatasetInfo) -> None:
    if outputs != info.num_classes:
        raise ModelError(
            f"the model has {outputs} classes, and {info.name} has {info.num_classes}: evaluate it on a dataset of its "
            "classes"
        )


@torch.inference_mode()
def count_correct(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int = _BATCH,
    quiet: bool = False,
) -> int:
    """Number of uint8 `images` [N, H, W, C] that the model, in eval mode, classifies as `labels` [N].

    Shows progress unless `quiet`.
    """
    device = next(model.parameters()).device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with evaluating(model):
        for start in counted(range(0, len(images), batch_size), "evaluating", quiet=quiet):
            batch = preprocessing(images[start : start + batch_size].to(device))
            target = labels[start : start + batch_size].to(device)
            correct += (model(batch).argmax(1) == target).sum()
    return int(correct)
