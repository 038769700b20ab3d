"""Classifying images of any size and kind with a model: its preprocessing as a transform, and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cnvzoo.checkpoints.folder import preprocessing_from
from cnvzoo.checkpoints.format import CheckpointConfig
from cnvzoo.data.datasets import Dataset
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.preprocessing import transforms as data_transforms
from cnvzoo.data.published import DatasetInfo, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.models.classifier import Classifier, class_names
from cnvzoo.models.modes import dtype_of, evaluating, unwrapped
from cnvzoo.training.evaluation import checked_logits, preprocessing_of_model
from cnvzoo_runtime.deployed_model import Prediction
from cnvzoo_runtime.images import ImageError
from cnvzoo_runtime.metadata import whole_number

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.transforms.v2 import Compose

_BATCH = 256  # images that are classified at a time


def transforms(
    source: str | Dataset | DatasetInfo | Preprocessing | CheckpointConfig | nn.Module,
    dataset: str | Dataset | DatasetInfo | None = None,
) -> Compose:
    """The torchvision v2 preprocessing of images for a model.

    The transform takes a PIL image or a uint8 tensor [C, H, W] of any size, and returns float32 [C, size, size]; from a
    uint8 batch [N, C, H, W] it makes [N, C, size, size].

    Args:
        source: a model, a checkpoint's config, a preprocessing, or a dataset by name or loaded. For a model adapted to
            other channels (1 or 3), images are converted to them and normalised by the mean over the checkpoint's
            channels.
        dataset: with a model that does not know its preprocessing, the dataset that it was trained on, by name or
            loaded.

    Raises:
        ModelError: the model does not know its preprocessing, or it takes neither 1 nor 3 channels.
        DatasetError: unknown dataset.
    """
    if isinstance(source, nn.Module):
        model = unwrapped(source)
        if dataset is not None:
            info = dataset_info(dataset) if isinstance(dataset, str) else dataset
            info = info.info if isinstance(info, Dataset) else info
            source = preprocessing_of_model(model, info, "give a Preprocessing in its place")
        else:
            source = known_preprocessing(model, "give the dataset that it was trained on, or set model.preprocessing")
    elif dataset is not None:
        raise ModelError("transforms takes a dataset beside a model only: leave one out")
    if isinstance(source, CheckpointConfig):  # of an adapted model, it may have any number of channels
        _check_channels(source.model["in_chans"])
        source = preprocessing_from(source)
    elif isinstance(source, Dataset):
        source = source.info
    elif not isinstance(source, (str, DatasetInfo, Preprocessing)):
        raise ModelError(
            f"{source!r}: transforms takes a model, a config, a Preprocessing, or a dataset, loaded or by name"
        )
    return data_transforms(source)


def known_preprocessing(model: nn.Module, remedy: str) -> Preprocessing:
    """The preprocessing that a model carries. Raises ModelError, with the caller's `remedy`, where it has none."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not a model: cnvzoo.create_model(NAME, pretrained=True) gives one")
    found = getattr(model, "preprocessing", None)
    if isinstance(found, Preprocessing):
        return found
    _check_channels(getattr(model, "in_chans", 3))
    raise ModelError(f"the {type(model).__name__} does not know its preprocessing: {remedy}")


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ModelError(f"the model takes {channels} channels, and transforms gives 1 or 3: convert images yourself")


@overload
def predict(model: nn.Module, images: Image | Tensor | NDArray[np.uint8], top: int = 5) -> list[Prediction]: ...


@overload
def predict(
    model: nn.Module, images: Sequence[Image | Tensor | NDArray[np.uint8]], top: int = 5
) -> list[list[Prediction]]: ...


def predict(model: nn.Module, images: Any, top: int = 5) -> list[Prediction] | list[list[Prediction]]:
    """The most probable classes of one image, or of each image of a list.

    The model is in eval mode for the call; afterwards each layer has the mode that it had. Its preprocessing and the
    names of its classes are those that it carries; classes without names are "0", "1", and so on.

    Args:
        model: a model of this library that knows its preprocessing, such as a pretrained one.
        images: a PIL image, a uint8 tensor [C, H, W] or a uint8 array [H, W, C], of any size; or a list of them,
            such as `list(batch)`.
        top: number of classes to return, at least 1, most probable first.

    Raises:
        ModelError: the model does not know its preprocessing, has no last layer or does not return logits, or `top` is
            below 1.
        ImageError: not an 8-bit image of 1 or 3 channels; of a list, the message has its index.
    """
    count = whole_number(top)
    if count is None or count < 1:
        raise ModelError(f"top={top!r}: a whole number of at least 1")
    model = unwrapped(model)
    if getattr(model, "num_classes", None) == 0:  # its outputs are features, whose softmax would mean nothing
        new = "reset_classifier(n), or " if isinstance(model, Classifier) else ""
        raise ModelError(f"the {type(model).__name__} has no last layer: {new}create it with num_classes=")
    transform = transforms(known_preprocessing(model, "set model.preprocessing"))
    if isinstance(images, (str, bytes, bytearray)):
        raise ImageError(f"expected images, got {type(images).__name__}: open a file with PIL.Image.open(path)")
    if not isinstance(images, Sequence):
        return _classify(model, [_transformed(transform, images)], count)[0]
    found = []
    for start in range(0, len(images), _BATCH):
        batch = [_transformed(transform, image, start + n) for n, image in enumerate(images[start : start + _BATCH])]
        found += _classify(model, batch, count)
    return found


def _transformed(transform: Compose, image: Any, index: int | None = None) -> Tensor:
    """The input for one image; errors say which of a list it is."""
    try:
        if getattr(image, "ndim", 3) == 4:  # `transform` would take it
            raise ImageError(f"a batch of shape {list(image.shape)}: give a list of its images, list(batch)")
        return transform(image)
    except ImageError as error:
        raise ImageError(f"images[{index}]: {error}" if index is not None else str(error)) from None


def _classify(model: nn.Module, inputs: Sequence[Tensor], top: int) -> list[list[Prediction]]:
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        batch = torch.stack(list(inputs)).to(device, dtype_of(model))
        probabilities = checked_logits(model(batch), len(batch)).float().softmax(1).cpu()
    names = class_names(model, probabilities.shape[1])
    best = probabilities.argsort(dim=1, descending=True, stable=True)[:, :top].tolist()
    return [
        [Prediction(names[index], index, float(row[index])) for index in order]
        for row, order in zip(probabilities, best, strict=True)
    ]
