"""Knowledge distillation: learning from the logits of trained nets beside the labels.

Teachers can cost as much as the net that learns from them. So the BatchNorms of a teacher are folded into the layers in
front of them, and where a recipe has a fixed number of augmented versions of each image (its views), the logits for
these are computed once, before training, and kept in a file beside the state of the run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from cnvzoo.data.batches import TrainBatches
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.training.progress import counted
from cnvzoo.training.recipe import Distillation
from cnvzoo.training.state import load_checked, save_checked


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of `model`, in evaluation mode, in which sequences have no BatchNorm behind a convolution or linear layer.

    What BatchNorm multiplies by is in the weights of that layer, what it adds in its bias: the outputs are the same to
    rounding, and a pass over each activation is saved. BatchNorm outside of an nn.Sequential stays.
    """
    folded = copy.deepcopy(model).eval()
    for sequence in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        for (_, layer), (name, norm) in pairwise(list(sequence.named_children())):
            if _fold(layer, norm):
                setattr(sequence, name, nn.Identity())
    return folded


def _fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Take `norm` into `layer`, if these are such layers."""
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        fuse = fuse_conv_bn_weights
    elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        fuse = fuse_linear_bn_weights
    else:
        return False
    assert norm.running_mean is not None
    assert norm.running_var is not None
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return True


@dataclass(frozen=True)
class PrecomputedLogits:
    """A teacher's logits for all views of all training images.

    Attributes:
        logits: [views * images, classes], in the order of `TrainBatches`: view * images + image.
        seconds: that computing them took.
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
        precomputed: its logits for all views, looked up instead of computed; None to compute them in every step.
    """

    def __init__(
        self, nets: Sequence[tuple[nn.Module, Preprocessing]], student: Preprocessing, distillation: Distillation
    ) -> None:
        self._nets = [_FrozenNet(model, own, student) for model, own in nets]
        self._distillation = distillation
        self.precomputed: PrecomputedLogits | None = None

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
            shown: int64 [N], their rows in the precomputed logits.
            logits: float32 [N, classes], the student's.
            label_loss: scalar.
        """
        theirs = self.logits(images) if self.precomputed is None else self.precomputed.logits[shown].float()
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


_BATCH = 500
_DTYPE = torch.float16  # finer than the bfloat16 in which teachers compute, and half of what float32 takes


def precompute_logits(
    teacher: Teacher,
    batches: TrainBatches,
    path: Path,
    facts: Mapping[str, Any],
    *,
    views: int,
    precision: Callable[[], AbstractContextManager[Any]],
    should_stop: Callable[[], bool],
    label: str,
    quiet: bool = False,
) -> bool:
    """Compute the teacher's logits for the first `views` views of all images and set `teacher.precomputed`.

    The file is saved after every view, and views that are in it already are not computed again. A file that is damaged
    or of another run is replaced.

    Args:
        teacher: whose logits are computed.
        batches: with views.
        path: of the file.
        facts: JSON values that identify the run, and what the bits of the logits depend on beside it.
        views: how many, at most those of `batches`.
        precision: the context in which the nets run.
        should_stop: asked before every batch.
        label: of the progress.
        quiet: no progress.

    Returns:
        Whether all logits are there; False if it was told to stop.
    """
    logits, seconds = _load(path, facts)
    for view in counted(range(len(logits), views), label, quiet=quiet):
        began, parts = time.monotonic(), []
        for images in batches.show(view, _BATCH):
            if should_stop():
                return False
            with torch.no_grad(), precision():
                parts.append(teacher.logits(images).to(_DTYPE))
        logits.append(torch.cat(parts).cpu())
        seconds += time.monotonic() - began
        save_checked({str(n): part for n, part in enumerate(logits)}, path, {"facts": facts, "seconds": seconds})
    teacher.precomputed = PrecomputedLogits(torch.cat(logits).to(batches.device), seconds)
    return True


def _load(path: Path, facts: Mapping[str, Any]) -> tuple[list[Tensor], float]:
    """The views that the file has for this run, and the seconds that they took."""
    try:
        logits, saved = load_checked(path)
        if saved["facts"] != facts:
            return [], 0.0
        return [logits[str(view)] for view in range(len(logits))], saved["seconds"]
    except (SafetensorError, OSError, KeyError, ValueError):
        return [], 0.0
