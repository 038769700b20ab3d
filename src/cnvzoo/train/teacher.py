"""Learning from the outputs of trained nets beside the labels: knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnvzoo.data import Preprocessing
from cnvzoo.models.folded import fold_batch_norms

from .recipe import Distillation


@dataclass(frozen=True)
class Memory:
    """What teachers said of all images in all views.

    Attributes:
        logits: [views * images, classes], by the numbers of TrainBatches.
        seconds: that it took them.
    """

    logits: Tensor
    seconds: float


class Teacher:
    """Trained nets that tell a student, for each image that they are shown, how likely each class is.

    The student is to give the teacher's probabilities, both softened by a temperature (Hinton et al. 2015, section
    2), for the very images that it learns from, augmented and mixed as they are (Beyer et al. 2022). Several nets
    speak as one, by the mean of their logits: the geometric mean of their probabilities (section 3).

    Args:
        nets: of the library, on the student's device, each with the preprocessing of the images that it was trained
            with; frozen from now on.
        student: preprocessing of the images that they will be shown.
        distillation: temperature, and weight of what the teacher says.

    Attributes:
        memory: what it says of all images that it will be asked about; None for a teacher that is to look.
    """

    def __init__(
        self, nets: Sequence[tuple[nn.Module, Preprocessing]], student: Preprocessing, distillation: Distillation
    ) -> None:
        self._nets = [_FrozenNet(model, own, student) for model, own in nets]
        self._distillation = distillation
        self.memory: Memory | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """What it says of images [N, C, H, W], as the student takes them: float32 [N, classes]."""
        return torch.stack([net(images) for net in self._nets]).mean(0)

    def loss(self, images: Tensor, shown: Tensor, logits: Tensor, label_loss: Tensor) -> Tensor:
        """What the student is to lower: `label_loss` and its distance from the teacher, weighed.

        The distance is the mean Kullback-Leibler divergence of the softened probabilities times the squared
        temperature, which keeps its gradients as large as those of the labels.

        Args:
            images: [N, C, H, W], as the student takes them.
            shown: int64 [N], their numbers in the memory.
            logits: float32 [N, classes], the student's.
            label_loss: scalar.
        """
        theirs = self.logits(images) if self.memory is None else self.memory.logits[shown].float()
        weight, temperature = self._distillation.weight, self._distillation.temperature
        distance = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(theirs / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - weight) * label_loss + weight * temperature**2 * distance


class _FrozenNet:
    """Logits, float32, of a trained net for images as another takes them."""

    def __init__(self, model: nn.Module, own: Preprocessing, student: Preprocessing) -> None:
        self._model = fold_batch_norms(model).requires_grad_(False)
        layout: Any = self._model
        layout.to(memory_format=torch.channels_last)
        device = next(model.parameters()).device
        own_mean, own_std, mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (own.mean, own.std, student.mean, student.std)
        )
        self._converts = own != student
        self._factor = (std / own_std).to(device, torch.float32)
        self._shift = ((mean - own_mean) / own_std).to(device, torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        shown = images * self._factor + self._shift if self._converts else images
        return self._model(shown).float()
