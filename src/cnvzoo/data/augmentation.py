"""The augmentation options of a recipe, and the operations on a finished batch: cutout and mixup.

The operations take their random numbers as arguments. Crop and flip are in `cnvzoo.data.batches`, where they are part
of gathering a batch.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Augmentation(BaseModel):
    """The augmentation of a recipe, applied in the order of the attributes. By default there is none.

    Attributes:
        crop_padding: random crop after padding by so many reflected pixels on each side; 0 for none; less than the side
            of the images.
        flip: mirror left-right with probability 1/2.
        cutout: side in pixels of a square filled with the mean colour, at most that of the images; 0 for none (DeVries
            & Taylor 2017, arXiv:1708.04552).
        mixup: alpha of the Beta distribution of mixup (Zhang et al. 2018, arXiv:1710.09412); 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    crop_padding: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    cutout: Annotated[int, Field(ge=0)] = 0
    mixup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


def cutout_(images: Tensor, rows: Tensor, cols: Tensor, side: int, fill: Tensor) -> Tensor:
    """Fill a square of each image, in place (DeVries & Taylor 2017, arXiv:1708.04552).

    The square begins side // 2 pixels before its centre and is clipped at the borders.

    Args:
        images: contiguous [B, S, S, C].
        rows, cols: int64 [B], the centres, in 0..S-1.
        side: height and width of the square in pixels.
        fill: [C], of the images' dtype.
    """
    b, s, _, c = images.shape
    span = torch.arange(side, device=images.device) - side // 2
    # Indices beyond a border are clamped to it, which gives the clipped square with a fixed number of indices.
    r = (rows[:, None] + span).clamp_(0, s - 1)
    q = (cols[:, None] + span).clamp_(0, s - 1)
    r += torch.arange(b, device=images.device)[:, None] * s
    index = (r[:, :, None] * s + q[:, None, :]).view(-1)
    images.view(-1, c).index_copy_(0, index, fill.expand(len(index), c))
    return images


def mix(x: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """mixup (Zhang et al. 2018, arXiv:1710.09412): lam * x + (1 - lam) * x[partner].

    Args:
        x: float [B, C, S, S].
        partner: int64 [B], a permutation of the batch.
        lam: scalar, 0 to 1: the share of each image itself.
    """
    return x[partner].lerp_(x, lam)


def mixed_targets(labels: Tensor, partner: Tensor, lam: Tensor, num_classes: int) -> Tensor:
    """Class probabilities float32 [B, K] for `mix`: lam for the label, 1 - lam for the partner's label."""
    classes = torch.arange(num_classes, device=labels.device)
    return (labels[:, None] == classes) * lam + (labels[partner][:, None] == classes) * (1 - lam)
