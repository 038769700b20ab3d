"""Views: a fixed number of augmented versions of each image, which the epochs use in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cnvzoo.data import Augmentation, Preprocessing, TrainBatches

IMAGES = 50
VIEWS = 3
OWN = Augmentation(crop_padding=4, flip=True, cutout=6)


def batches(seed: int = 0, **changes: Any) -> TrainBatches:
    images = torch.randint(256, (IMAGES, 16, 16, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    arguments: dict[str, Any] = {"augmentation": OWN, "views": VIEWS} | changes
    preprocessing = Preprocessing(16, (0.5,) * 3, (0.25,) * 3)
    return TrainBatches(
        images, torch.arange(IMAGES), num_classes=IMAGES, preprocessing=preprocessing, batch_size=8, seed=seed,
        device="cpu", **arguments,
    )  # fmt: skip


def shown_in(made: TrainBatches, epoch: int) -> dict[int, Tensor]:
    """The augmented image of the epoch for each label."""
    return {
        int(label): image for images, labels in made.epoch(epoch) for image, label in zip(images, labels, strict=True)
    }


def alike(one: dict[int, Tensor], other: dict[int, Tensor]) -> int:
    """How many of the images that both have are the same."""
    return sum(torch.equal(one[image], other[image]) for image in one.keys() & other.keys())


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_view_is_shown_again_after_all_others(epoch: int) -> None:
    made = batches()
    first, again = shown_in(made, epoch), shown_in(made, epoch + VIEWS)
    both = len(first.keys() & again.keys())
    assert both >= IMAGES - 4
    assert alike(first, again) == both
    for other in range(epoch + 1, epoch + VIEWS):
        assert alike(first, shown_in(made, other)) < 5


def test_the_order_is_new_in_every_epoch() -> None:
    made = batches()
    assert list(shown_in(made, 0)) != list(shown_in(made, VIEWS))


def test_views_differ_between_seeds() -> None:
    assert alike(shown_in(batches(0), 0), shown_in(batches(1), 0)) < 5


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_show_returns_the_images_of_a_view_by_their_numbers(batch_size: int) -> None:
    made = batches()
    shown = torch.cat([torch.cat(list(made.show(view, batch_size))) for view in range(VIEWS)])
    assert len(shown) == VIEWS * IMAGES
    for epoch in (0, 2, 4):
        plan = made.plan(epoch)
        for step, (images, _) in enumerate(made.epoch(epoch)):
            assert torch.equal(images, shown[plan.rows[step, -1]])


def test_without_views_no_epoch_repeats_another() -> None:
    made = batches(views=None)
    first = shown_in(made, 0)
    assert all(alike(first, shown_in(made, epoch)) < 5 for epoch in range(1, 9))


@pytest.mark.parametrize("changes", [{"views": 0}, {"augmentation": Augmentation(mixup=0.2)}], ids=str)
def test_no_views_and_views_with_mixup_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="views must be at least 1, and without mixup"):
        batches(**changes)
