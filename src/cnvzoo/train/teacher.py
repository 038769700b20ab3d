"""Learning from the outputs of trained nets beside the labels: knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnvzoo.data import Preprocessing
from cnvzoo.models.folded import fold_batch_norms

from .recipe import Distillation


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
    """

    def __init__(
        self, nets: Sequence[tuple[nn.Module, Preprocessing]], student: Preprocessing, distillation: Distillation
    ) -> None:
        self._nets = [_FrozenNet(model, own, student) for model, own in nets]
        self._distillation = distillation

    def loss(self, images: Tensor, logits: Tensor, label_loss: Tensor) -> Tensor:
        """What the student is to lower: `label_loss` and its distance from the teacher, weighed.

        The distance is the mean Kullback-Leibler divergence of the softened probabilities times the squared
        temperature, which keeps its gradients as large as those of the labels.

        Args:
            images: [N, C, H, W], as the student takes them.
            logits: float32 [N, classes], the student's.
            label_loss: scalar.
        """
        with torch.no_grad():
            theirs = torch.stack([net(images) for net in self._nets]).mean(0)
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
        model = fold_batch_norms(model).requires_grad_(False)
        layout: Any = model
        layout.to(memory_format=torch.channels_last)
        device = next(model.parameters()).device
        self._model = torch.compile(model, fullgraph=True) if device.type == "cuda" else model  # as for the student
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
