"""One run: from a recipe to a record and weights, through any number of interruptions.

A run lives in a folder: `state.safetensors` while it is under way, `record.json` and `weights.safetensors` when
it is done. State is saved every minute, and at a signal or deadline, by replacing the file in one step; so
whatever kills the process, the run goes on from a whole state and ends with the bits it would have had.


The library's front: models by name, what they cost, and training and evaluating them.

Counting right answers: float32, one crop, the model's own graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cnvzoo.data.datasets import Dataset, dataset_info, load_dataset
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.errors import ModelError
from cnvzoo.models.registry import ModelSpec, model_spec
from cnvzoo.training.device import deterministic, resolve_device
from cnvzoo.training.progress import counted


def preprocessing_of(model: str, dataset: str) -> Preprocessing:
    """How images of `dataset` reach `model`: quantized models take the 8-bit image, others a normalised one."""
    spec = model_spec(model)
    return Preprocessing.for_dataset(dataset_info(dataset), size=spec.input_size, normalize=not spec.quantized)


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


_BATCH = 1000


@torch.inference_mode()
def count_correct(
    model: nn.Module, images: Tensor, labels: Tensor, preprocessing: Preprocessing, *, quiet: bool = False
) -> int:
    """How many of uint8 `images` [N, H, W, C] the model classifies as `labels` [N].

    The model is put in eval mode meanwhile. Progress is shown unless `quiet`.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for start in counted(range(0, len(images), _BATCH), "evaluating", quiet=quiet):
        batch = preprocessing(images[start : start + _BATCH].to(device))
        target = labels[start : start + _BATCH].to(device)
        correct += (model(batch).argmax(1) == target).sum()
    model.train(was_training)
    return int(correct)
