"""Knowledge distillation: learning from the logits of trained networks as well as from labels.

A teacher can cost as much per step as its student. So BatchNorms of a teacher are folded into the layers before them,
and where a recipe has a fixed number of augmented versions of each image (views), the teacher's logits for all of them
are computed once, before training, and kept in a file beside the state of the run. Either way the teacher gets the very
images that the student gets, crops included.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
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
from cnvzoo.errors import ModelError
from cnvzoo.models.layers import DepthwiseConv2d, FullFieldConv2d, PointwiseConv2d
from cnvzoo.models.modes import memory_format_of
from cnvzoo.models.norm_act import NormActSequential, has_hooks
from cnvzoo.progress import counting
from cnvzoo.training.recipe import Distillation
from cnvzoo.training.state import load_checked, save_checked

_PLAIN = (  # compute with the weights that they hold, and nothing else
    nn.Conv2d, FullFieldConv2d, DepthwiseConv2d, PointwiseConv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d
)  # fmt: skip
_IN_ORDER = (nn.Sequential.forward, NormActSequential.forward)  # call their layers one after the other


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, with BatchNorm folded into the convolution or linear layer before it.

    The layer's weights take up BatchNorm's factor and its bias the shift, so outputs are equal up to rounding, and a
    pass over each activation is saved. Only neighbours in an nn.Sequential are folded, and no layer that is used twice,
    has hooks, or is of a subclass that may compute something else.

    A linear layer is folded for inputs [B, F]; the copy raises ModelError for others, as BatchNorm1d normalizes the
    channels of [B, C, F].
    """
    folded = copy.deepcopy(model).eval()
    uses = Counter(id(module) for _, module in folded.named_modules(remove_duplicate=False))
    for sequence in [module for module in folded.modules() if getattr(type(module), "forward", None) in _IN_ORDER]:
        # every place of a layer that comes twice, which named_children() would name once
        for (_, layer), (name, norm) in pairwise(list(sequence._modules.items())):
            if uses[id(layer)] == 1 and _fold(layer, norm):
                setattr(sequence, name, _Rows() if isinstance(layer, nn.Linear) else nn.Identity())
    return folded


def _fold(layer: nn.Module | None, norm: nn.Module | None) -> bool:
    """Fold `norm` into `layer` and return True, or return False where that could change outputs."""
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        fuse = fuse_conv_bn_weights
    elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        fuse = fuse_linear_bn_weights
    else:
        return False
    # a subclass, which a parametrization makes too, and a hook may compute another weight or output
    if type(layer) not in _PLAIN or type(norm) not in _PLAIN or has_hooks(layer, norm):
        return False
    if norm.running_mean is None or norm.running_var is None:  # it takes the statistics of each batch
        return False
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return True


class _Rows(nn.Identity):
    """In the place of a BatchNorm1d that was folded into the linear layer before it."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 2:
            raise ModelError(
                f"a BatchNorm1d of a teacher follows a linear layer whose outputs are {list(input.shape)}, not [B, F]: "
                "put it into a module of its own, which is not folded"
            )
        return input


@dataclass(frozen=True)
class PrecomputedLogits:
    """A teacher's logits for all views of all training images.

    Attributes:
        logits: float16 [views * N, K] on the device of training; row view * N + image, for views as
            `TrainBatches.view_of` numbers them. Rows of views that training does not show are zero.
        seconds: time that computing them took.
    """

    logits: Tensor
    seconds: float


class Teacher:
    """One or more trained networks whose class probabilities a student learns to reproduce.

    The probabilities of both are softened by a temperature (Hinton et al. 2015, arXiv:1503.02531, section 2). The
    teacher takes the same augmented images as the student (Beyer et al. 2022, arXiv:2106.05237). The logits of several
    networks are averaged, which is the geometric mean of their probabilities (Hinton et al., section 3).

    Args:
        nets: trained networks on the student's device, each with the preprocessing that it was trained with.
        student: preprocessing of the images that `logits` and `loss` are given.
        distillation: temperature, and weight of the teacher in the loss.

    Attributes:
        precomputed: logits for all views, which `loss` looks up; None to compute logits in every step.
    """

    def __init__(
        self, nets: Sequence[tuple[nn.Module, Preprocessing]], student: Preprocessing, distillation: Distillation
    ) -> None:
        self._nets = [_FrozenNet(model, own, student) for model, own in nets]
        self._distillation = distillation
        self.precomputed: PrecomputedLogits | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Mean logits, float32 [B, K], for images [B, C, H, W] in the student's preprocessing."""
        return torch.stack([net(images) for net in self._nets]).mean(0)

    def loss(self, images: Tensor, logit_rows: Tensor, logits: Tensor, label_loss: Tensor) -> Tensor:
        """The student's loss: weighted sum of `label_loss` and the divergence from the teacher.

        The divergence is the mean Kullback-Leibler divergence of the softened probabilities, times the squared
        temperature so that its gradients do not shrink as the temperature grows. With `standardize`, logits are divided
        by their standard deviation too, so the divergence is also multiplied by the square of the teacher's mean
        standard deviation in the batch. For a mean of 3 that is the factor of 9 (`--kd-weight`) of Sun et al. 2024
        (arXiv:2403.01693).

        Args:
            images: [B, C, H, W] in the student's preprocessing.
            logit_rows: int64 [B], rows of the images in the precomputed logits.
            logits: float32 [B, K], the student's.
            label_loss: scalar.
        """
        if self.precomputed is None:
            teacher_logits = self.logits(images)
        else:
            teacher_logits = self.precomputed.logits[logit_rows].float()
        weight, temperature = self._distillation.weight, self._distillation.temperature
        factor: float | Tensor = temperature**2
        if self._distillation.standardize:
            factor = factor * teacher_logits.std(1, correction=0).mean() ** 2
            logits, teacher_logits = _standardized(logits), _standardized(teacher_logits)
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(teacher_logits / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - weight) * label_loss + weight * factor * divergence


def _standardized(logits: Tensor) -> Tensor:
    """Each row of [B, K] at mean 0 and standard deviation 1; a row of equal logits at 0, with finite gradients."""
    return F.layer_norm(logits, logits.shape[1:], eps=1e-12)


class _FrozenNet:
    """Maps images [B, C, H, W] in the student's preprocessing to a trained network's logits, float32 [B, K]."""

    def __init__(self, model: nn.Module, own: Preprocessing, student: Preprocessing) -> None:
        self._model = fold_batch_norms(model).requires_grad_(False)
        layout: Any = self._model
        layout.to(memory_format=memory_format_of(self._model))
        device = next(model.parameters()).device
        own_mean, own_std, mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (own.mean, own.std, student.mean, student.std)
        )
        self._converts = own != student
        self._factor = (std / own_std).to(device, torch.float32)
        self._shift = ((mean - own_mean) / own_std).to(device, torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        converted = images * self._factor + self._shift if self._converts else images
        return self._model(converted).float()


_BATCH = 500
_DTYPE = torch.float16  # finer than bfloat16, and half the size of float32


def precompute_logits(
    teacher: Teacher,
    batches: TrainBatches,
    path: Path,
    facts: Mapping[str, Any],
    *,
    views: Mapping[int, int | None],
    autocast: Callable[[], AbstractContextManager[Any]],
    should_stop: Callable[[], bool],
    label: str,
    quiet: bool = False,
) -> bool:
    """Compute the teacher's logits for the views of all images that training shows, and set `teacher.precomputed`.

    The file is saved after every view, and views that are in it are not computed again. A file that is damaged or
    belongs to another run is replaced.

    Args:
        teacher: whose logits are computed.
        batches: batches with views.
        path: file that the logits are kept in.
        facts: JSON values that tell runs apart: identity of the run and conditions that its bits depend on.
        views: the views to compute, as `TrainBatches.view_of` numbers them, each with the side of its images.
        autocast: returns the context of the forward passes.
        should_stop: called before every batch.
        label: name of the work in the progress.
        quiet: no progress.

    Returns:
        True when all logits are computed, False when `should_stop()` came first.
    """
    logits, seconds = _load(path, facts)
    missing = [view for view in views if view not in logits]
    with counting(len(missing) * -(-batches.num_images // _BATCH), label, quiet=quiet) as one_more:
        for view in missing:
            began, parts = time.monotonic(), []
            for images in batches.show(view, _BATCH, views[view]):
                if should_stop():
                    return False
                with torch.no_grad(), autocast():
                    parts.append(teacher.logits(images).to(_DTYPE))
                one_more()
            logits[view] = torch.cat(parts).cpu()
            seconds += time.monotonic() - began
            save_checked({str(n): part for n, part in logits.items()}, path, {"facts": facts, "seconds": seconds})
    rows = torch.zeros(max(views) + 1, *logits[max(views)].shape, dtype=_DTYPE)  # those of views that are not shown
    for view in views:
        rows[view] = logits[view]
    teacher.precomputed = PrecomputedLogits(rows.flatten(0, 1).to(batches.device), seconds)
    return True


def _load(path: Path, facts: Mapping[str, Any]) -> tuple[dict[int, Tensor], float]:
    """The logits of the views that the file has for this run, and the seconds that computing them took."""
    try:
        logits, saved = load_checked(path)
        if saved["facts"] != facts:
            return {}, 0.0
        # copies: on Windows the file cannot be replaced while its tensors are mapped from it
        return {int(view): part.clone() for view, part in logits.items()}, saved["seconds"]
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}, 0.0
