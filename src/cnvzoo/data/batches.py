"""Training batches from images in the device's memory; sampling, crop and flip are one gather.

A batch is a function of seed, epoch and step. The random numbers of an epoch (its plan) are drawn on the CPU before the
epoch starts, from a generator of its own, and batch k uses slice k of the plan. So a run can resume at any step, the
augmentation is the same on every device, and global random state is neither read nor changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnvzoo.data.augmentation import Augmentation, cutout_, mix, mixed_targets
from cnvzoo.data.preprocessing import Preprocessing


class BatchPlan(NamedTuple):
    """The random numbers of an epoch, on the device; index k of `rows` and `lam` is step k.

    Attributes:
        rows: int64 [steps, 8, B]: index of the image, row and column of the crop, flip, row and column of the cutout,
            mixup partner, and view * N + image, which numbers the augmented images of all views, those of whole images
            and of early crops.
        lam: float32 [steps], the share of each image itself in mixup; None without mixup.
        side: height and width in pixels of the batches' images.
    """

    rows: Tensor
    lam: Tensor | None
    side: int


class TrainBatches:
    """Shuffled, augmented batches of a training set.

    Args:
        images: uint8 [N, H, W, C]; kept on `device`.
        labels: integers [N], 0 to num_classes - 1.
        num_classes: K.
        preprocessing: from image to network input; its zero padding comes before the crop.
        augmentation: the options of the recipe.
        batch_size: B; the partial last batch of an epoch is dropped.
        seed: any integer.
        device: where the batches are made.
        views: V, number of augmented versions of each image: epoch e shows version e % V, of whole images or of fixed
            early crops. None: a new version in every epoch.

    Raises:
        TypeError: images that are not uint8, labels that are not integers.
        ValueError: shapes, labels, batch size, augmentation or views that do not fit together.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        views: int | None = None,
    ) -> None:
        padded = preprocessing.pad(images)
        _check(padded, labels, num_classes, augmentation, batch_size)
        if views is not None and (views < 1 or augmentation.mixup):
            raise ValueError(f"views must be at least 1, and without mixup, got {views} with {augmentation}.")
        self.num_classes = num_classes
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.seed = seed
        self.views = views
        self.device = torch.device(device)
        self._size = preprocessing.size
        self._pixels = padded.contiguous().to(self.device).view(-1, preprocessing.in_chans)
        self._labels = labels.to(self.device, torch.int64)
        # from padded to real coordinates, so that no padded copy of the images is kept
        p, s = augmentation.crop_padding, self._size
        self._reflect = (s - 1 - (s - 1 - torch.arange(-p, s + p, device="cpu").abs()).abs()).to(self.device)
        self._span = torch.arange(s, device=self.device)
        self._mean_colour = _mean_colour(images).to(self.device) if augmentation.cutout else None

    @property
    def steps_per_epoch(self) -> int:
        return len(self._labels) // self.batch_size

    @property
    def num_images(self) -> int:
        """Number of images of the training set."""
        return len(self._labels)

    def epoch(self, epoch: int, start: int = 0, *, side: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on; they do not depend on `start`.

        Args:
            epoch, start: from 0 on.
            side: S, height and width in pixels of the early crop of each image, at a random place. None: the whole
                image. With views it must be the same in all epochs of early crops: the numbers of the views do not
                tell sides apart.

        Yields:
            x: float32 [B, C, S, S] in channels_last.
            target: int64 [B], or float32 [B, K] with rows that sum to 1 with mixup.

        Raises:
            ValueError: a negative epoch, `start` outside 0..steps_per_epoch, or `side` below 1, below the cutout or
                larger than the images.
        """
        if epoch < 0 or not 0 <= start <= self.steps_per_epoch:
            raise ValueError(
                f"Expected an epoch of at least 0 and a start of 0 to {self.steps_per_epoch}, "
                f"got epoch {epoch}, start {start}."
            )
        return self._iterate(self.plan(epoch, side), start)

    def _iterate(self, plan: BatchPlan, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, self.steps_per_epoch):
            yield self.make(plan, step)

    def _checked_side(self, side: int | None) -> int:
        if side is None:
            return self._size
        if not 1 <= side <= self._size:
            raise ValueError(f"side must be 1 to {self._size}, the side of the images, got {side}.")
        if self.augmentation.cutout > side:
            raise ValueError(
                f"cutout must be at most side, got a cutout of {self.augmentation.cutout} and side {side}."
            )
        return side

    def make(self, plan: BatchPlan, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one step of a plan, as `epoch` yields it."""
        return self.make_from(plan.rows[step], None if plan.lam is None else plan.lam[step], plan.side)

    def plan(self, epoch: int, side: int | None = None) -> BatchPlan:
        """Draw the random numbers of an epoch; arguments and errors as for `epoch`."""
        if epoch < 0:
            raise ValueError(f"Expected an epoch of at least 0, got {epoch}.")
        side = self._checked_side(side)
        shape = (self.steps_per_epoch, self.batch_size)
        g = torch.Generator().manual_seed(_hashed("epoch", self.seed, epoch))
        count = shape[0] * shape[1]
        image = torch.randperm(len(self._labels), generator=g, device="cpu")[:count].view(shape)
        if self.views is None:
            view, augmented = 0, self._draw_augmentation(shape, g)
            self._move_to_crop_(augmented, side, epoch)
        else:
            view = self.view_of(epoch, side)
            augmented = self._draw_view(view, side)[:, image]
        partner = torch.rand(shape, generator=g, dtype=torch.float32, device="cpu").argsort(dim=1)
        lam = self._draw_lam(g)
        rows = torch.stack([image, *augmented, partner, view * len(self._labels) + image], dim=1)
        return BatchPlan(rows.to(self.device), None if lam is None else lam.to(self.device), side)

    def _draw_augmentation(self, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        """Row and column of the crop, flip, row and column of the cutout: int64 [5, *shape]."""
        row, col = torch.randint(2 * self.augmentation.crop_padding + 1, (2, *shape), generator=g, device="cpu")
        share = 0.5 if self.augmentation.flip else 0.0
        flip = torch.rand(shape, generator=g, dtype=torch.float32, device="cpu") < share
        cutout_row, cutout_col = torch.randint(self._size, (2, *shape), generator=g, device="cpu")
        return torch.stack([row, col, flip, cutout_row, cutout_col])

    def _move_to_crop_(self, augmented: Tensor, side: int, number: int) -> None:
        """Change random numbers drawn for whole images into those for an early crop of each, in place."""
        if side == self._size:
            return
        # "part" is what early crops were called first: another word would draw other numbers
        g = torch.Generator().manual_seed(_hashed("part", self.seed, number))
        augmented[:2] += torch.randint(self._size - side + 1, augmented[:2].shape, generator=g, device="cpu")
        augmented[3:] = augmented[3:] * side // self._size

    def view_of(self, epoch: int, side: int | None = None) -> int:
        """The view that an epoch shows: 0 to V - 1 of whole images, V to 2 V - 1 of early crops.

        Args:
            epoch, side: as for `epoch`; the batches have views.
        """
        assert self.views is not None
        return epoch % self.views + (0 if self._checked_side(side) == self._size else self.views)

    def _draw_view(self, view: int, side: int) -> Tensor:
        """`_draw_augmentation` for all images, in their order, and for crops of this side."""
        g = torch.Generator().manual_seed(_hashed("view", self.seed, view))
        augmented = self._draw_augmentation((len(self._labels),), g)
        self._move_to_crop_(augmented, side, view)
        return augmented

    def show(self, view: int, batch_size: int, side: int | None = None) -> Iterator[Tensor]:
        """All images of a view in their order, as batches of network inputs: float32 [B, C, S, S].

        Args:
            view: as `view_of` numbers them.
            batch_size: B.
            side: S, that of the epochs which show this view; None for whole images.
        """
        side = self._checked_side(side)
        image = torch.arange(len(self._labels), device="cpu")
        rows = torch.stack([image, *self._draw_view(view, side), torch.zeros_like(image), image]).to(self.device)
        for batch in rows.split(batch_size, dim=1):
            yield self.make_from(batch, side=side)[0]

    def _draw_lam(self, g: torch.Generator) -> Tensor | None:
        """lam of every step, float32 [steps]; None without mixup."""
        alpha = self.augmentation.mixup
        if not alpha:
            return None
        # torch's Beta takes no generator, so NumPy's is seeded from ours.
        numpy_generator = np.random.default_rng(int(torch.randint(2**62, (), generator=g, device="cpu")))
        return torch.from_numpy(numpy_generator.beta(alpha, alpha, self.steps_per_epoch)).float()

    def make_from(self, rows: Tensor, lam: Tensor | None = None, side: int | None = None) -> tuple[Tensor, Tensor]:
        """The batch of one step of a plan: a function of tensors on the device, so it can be captured in a CUDA graph.

        Args:
            rows, lam: those of the step.
            side: that of the plan. None: whole images.
        """
        augmentation, s = self.augmentation, self._size
        side = side or s
        span = self._span[:side]
        image, row, col, flip, cutout_row, cutout_col, partner, _ = rows
        column = torch.where(flip.bool()[:, None], span.flip(0), span)
        r = self._reflect[row[:, None] + span]
        q = self._reflect[col[:, None] + column]
        index = ((image[:, None] * s + r) * s)[:, :, None] + q[:, None, :]
        images = self._pixels.index_select(0, index.view(-1)).view(len(image), side, side, -1)
        if self._mean_colour is not None:
            cutout_(images, cutout_row, cutout_col, augmentation.cutout, self._mean_colour)
        x, labels = replace(self.preprocessing, size=side, image_size=None)(images), self._labels[image]
        if lam is None:
            return x, labels
        return mix(x, partner, lam), mixed_targets(labels, partner, lam, self.num_classes)


def _hashed(what: str, seed: int, number: int) -> int:
    """The seed of the generator of an epoch or a view."""
    # hashed, so that seed 0 of epoch 1 and seed 1 of epoch 0 differ; torch's CPU generator takes 32 bits
    return int.from_bytes(hashlib.sha256(f"cnvzoo {what} {seed}/{number}".encode()).digest()[:4], "little")


def _mean_colour(images: Tensor) -> Tensor:
    """uint8 [C], the mean of all pixels: cutout fills before scaling, so network inputs stay multiples of 1/255."""
    n, _, w, c = images.shape
    # sums of 4096 rows, at most 4096 * 255, are exact in float32
    rows = images.reshape(-1, w * c).split(4096)
    total = torch.stack([r.float().sum(0) for r in rows]).sum(0, dtype=torch.float64)
    return (total.view(w, c).sum(0) / (n * w * w)).round().to(torch.uint8)


def _check(images: Tensor, labels: Tensor, num_classes: int, augmentation: Augmentation, batch_size: int) -> None:
    size = images.shape[1]
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"Labels must be integers, got {labels.dtype}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"Expected one label per image: {len(images)} images, labels of shape {list(labels.shape)}.")
    if not 1 <= batch_size <= len(labels):
        raise ValueError(
            f"batch_size must be 1 to {len(labels)}, the number of training images, got {batch_size}: "
            "the partial last batch is dropped, so no batch would be left."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"Labels must be 0 to {num_classes - 1} for {num_classes} classes, got {low} to {high}.")
    if augmentation.crop_padding >= size:
        raise ValueError(
            f"crop_padding must be below the image side {size} (a reflection cannot be wider than the image), "
            f"got {augmentation.crop_padding}."
        )
    if augmentation.cutout > size:
        raise ValueError(f"cutout must be at most the image side {size}, got {augmentation.cutout}.")
