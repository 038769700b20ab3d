"""Top-1 accuracy on a test set: float32, one crop, no augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cnvzoo.data.datasets import Dataset, load_dataset
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.published import DatasetInfo, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.models.modes import evaluating, moved, unwrapped
from cnvzoo.models.registry import ModelSpec, model_spec
from cnvzoo.progress import counted
from cnvzoo.training.device import deterministic, resolve_device


def preprocessing_of(model: str, dataset: str) -> Preprocessing:
    """Preprocessing of a dataset's images for a model: quantized models take uint8 / 255, others normalised images."""
    return _preprocessing_for(model_spec(model), dataset_info(dataset))


def _preprocessing_for(spec: ModelSpec, info: DatasetInfo) -> Preprocessing:
    return Preprocessing.for_dataset(info, size=spec.input_size, normalize=not spec.quantized)


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy of a model: `correct` of `total` images."""

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
    """Score a model on the test set of a dataset: float32, one crop, no augmentation.

    Args:
        model: maps images [B, C, H, W] to logits [B, K]. It is left as it was: in mode, device and memory
            layout. The wrappers of torch.compile and DataParallel are not used.
        dataset: name of a dataset, or a loaded one.
        preprocessing: from uint8 images to the model's inputs; by default that of training, for models of this library.
        device: `auto`, or anything torch.device takes.
        data_root: folder of the dataset cache.

    Raises:
        ModelError: the model is not from this library and no preprocessing was given.
        CnvzooError: the device is not available.
    """
    model = unwrapped(model)
    data = load_dataset(dataset, root=data_root) if isinstance(dataset, str) else dataset
    if preprocessing is None:
        spec = getattr(model, "spec", None)
        if not isinstance(spec, ModelSpec):
            raise ModelError(f"{type(model).__name__} is not a model of cnvzoo: give its preprocessing=")
        preprocessing = _preprocessing_for(spec, data.info)
    target = resolve_device(device)
    with deterministic(target), moved(model, target):
        correct = count_correct(model, data.test_images, data.test_labels, preprocessing)
    return Evaluation(correct, len(data.test_labels))


@torch.inference_mode()
def count_correct(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 1000,
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
