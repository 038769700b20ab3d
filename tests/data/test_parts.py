"""Epochs that show a random square part of each image, augmented as whole images are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cnvzoo.data import Augmentation, Preprocessing, TrainBatches

SIDE = 16
PART = 6
NORMALISED = Preprocessing(SIDE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def batches(images: Tensor, **changes: Any) -> TrainBatches:
    arguments: dict[str, Any] = {
        "num_classes": len(images),
        "preprocessing": Preprocessing(SIDE, (0.0,) * 3, (1.0,) * 3),
        "augmentation": Augmentation(),
        "batch_size": 8,
        "seed": 0,
    }
    return TrainBatches(images, torch.arange(len(images)), device="cpu", **(arguments | changes))


def noise(count: int) -> Tensor:
    return torch.randint(256, (count, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def coordinates(count: int) -> Tensor:
    """Images whose channels are the row, the column, and 7."""
    span = torch.arange(SIDE, dtype=torch.uint8)
    rows, columns = torch.meshgrid(span, span, indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 7)], dim=-1).expand(count, SIDE, SIDE, 3)


def is_part_of(part: Tensor, image: Tensor) -> bool:
    """Whether the part [C, s, s] is somewhere in the image [C, S, S]."""
    side = part.shape[-1]
    windows = image.unfold(1, side, 1).unfold(2, side, 1)
    return bool((windows == part[:, None, None]).flatten(3).all(3).all(0).any())


@pytest.mark.parametrize("flip", [False, True])
def test_every_position_is_equally_likely(flip: bool) -> None:
    made = batches(coordinates(2048), augmentation=Augmentation(flip=flip), num_classes=2048, batch_size=64)
    places = torch.zeros(SIDE - PART + 1, SIDE - PART + 1, dtype=torch.float64)
    mirrored = 0
    for epoch in range(2):
        for x, _ in made.epoch(epoch, side=PART):
            assert x.shape == (64, 3, PART, PART)
            where = (x * 255).round().long()
            top, left = where[:, 0].amin((1, 2)), where[:, 1].amin((1, 2))
            span = torch.arange(PART)
            assert torch.equal(where[:, 0], (top[:, None] + span)[:, :, None].expand(-1, -1, PART))
            columns = (left[:, None] + span)[:, None].expand(-1, PART, -1)
            flipped = where[:, 1, 0, 0] > left
            mirrored += int(flipped.sum())
            assert torch.equal(where[:, 1], torch.where(flipped[:, None, None], columns.flip(2), columns))
            places.index_put_((top, left), torch.ones((), dtype=torch.float64), accumulate=True)
    assert abs(mirrored - 2048 * flip) < 4 * 1024**0.5
    expected = 4096 / places.numel()
    chi_squared = float(((places - expected) ** 2 / expected).sum())
    assert abs(chi_squared - (places.numel() - 1)) < 4 * (2 * (places.numel() - 1)) ** 0.5


def test_parts_are_of_the_padded_image() -> None:
    reached = set()
    made = batches(coordinates(512), augmentation=Augmentation(crop_padding=3), num_classes=512)
    for x, _ in made.epoch(0, side=PART):
        rows = (x[:, 0, :, 0] * 255).round().long()
        reached |= {tuple(r) for r in rows.tolist()}
    beyond = {tuple(abs(start + i) for i in range(PART)) for start in range(-3, 0)}
    assert beyond <= reached


def test_a_part_is_normalised_as_the_whole_image_is() -> None:
    images = noise(40)
    made = batches(images, preprocessing=NORMALISED)
    whole = NORMALISED(images)
    for x, labels in made.epoch(0, side=PART):
        assert all(is_part_of(part, whole[label]) for part, label in zip(x, labels, strict=True))
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_images_of_a_padded_input_are_shown_in_part_too() -> None:
    preprocessing = Preprocessing(SIDE + 4, (0.0,) * 3, (1.0,) * 3, SIDE)
    x, _ = next(batches(noise(8), preprocessing=preprocessing).epoch(0, side=PART))
    assert x.shape[2:] == (PART, PART)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_show_returns_the_parts_of_a_view_by_their_numbers(batch_size: int) -> None:
    images, augmentation = noise(40), Augmentation(crop_padding=4, flip=True, cutout=3)
    made = batches(images, augmentation=augmentation, views=2)
    assert [made.view_of(epoch) for epoch in range(3)] == [0, 1, 0]
    assert [made.view_of(epoch, PART) for epoch in range(3)] == [2, 3, 2]
    parts = {view: torch.cat(list(made.show(view, batch_size, PART))) for view in (2, 3)}
    assert not any(torch.equal(one, other) for one, other in zip(parts[2], parts[3], strict=True))
    for epoch in range(4):
        plan, view = made.plan(epoch, PART), 2 + epoch % 2
        for step, (x, labels) in enumerate(made.epoch(epoch, side=PART)):
            assert torch.equal(plan.rows[step, -1], view * 40 + labels)
            assert torch.equal(x, parts[view][labels])


def test_parts_of_views_are_of_the_augmented_images() -> None:
    images = noise(40)
    made, whole = batches(images, preprocessing=NORMALISED, views=2), NORMALISED(images)
    shown = torch.cat(list(made.show(3, 100, PART)))
    assert all(is_part_of(part, image) for part, image in zip(shown, whole, strict=True))


def test_targets_have_the_shares_of_the_parts() -> None:
    levels = torch.arange(64, dtype=torch.uint8)
    images = levels[:, None, None, None].expand(64, SIDE, SIDE, 3)
    mixed = 0
    for x, target in batches(images, augmentation=Augmentation(mixup=1.0)).epoch(0, side=PART):
        torch.testing.assert_close(x.mean((1, 2, 3)) * 255, target @ levels.float(), rtol=1e-5, atol=1e-4)
        mixed += int((target.max(1).values < 0.99).sum())
    assert mixed > 16


def test_cutout_is_in_the_part() -> None:
    images = torch.zeros(256, SIDE, SIDE, 3, dtype=torch.uint8)
    images[::2] = 254  # the mean, 127, is nowhere
    sizes, centres = [], torch.zeros(PART)
    for x, _ in batches(images, augmentation=Augmentation(cutout=3)).epoch(0, side=PART):
        filled = (x[:, 0] * 255).round() == 127
        sizes += filled.sum((1, 2)).tolist()
        centres += filled.any(2).sum(0)
    assert set(sizes) == {4, 6, 9}
    assert centres.min() > 40


def test_a_part_as_large_as_the_image_is_the_whole_image() -> None:
    augmentation = Augmentation(crop_padding=4, flip=True, cutout=6, mixup=0.4)
    made = batches(noise(40), augmentation=augmentation)
    for (x, target), (same_x, same_target) in zip(made.epoch(1), made.epoch(1, side=SIDE), strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(target, same_target)


def test_parts_can_be_combined_with_all_augmentations_and_are_repeatable() -> None:
    augmentation = Augmentation(crop_padding=4, flip=True, cutout=6, mixup=0.4)
    made = batches(noise(40), augmentation=augmentation)
    whole = list(made.epoch(1, side=PART))
    for (x, target), (same_x, same_target) in zip(made.epoch(1, 2, side=PART), whole[2:], strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(target, same_target)


@pytest.mark.parametrize("side", [0, SIDE + 1])
def test_a_part_larger_than_the_image_or_empty_is_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"side must be 1 to {SIDE}, the side of the images, got {side}"):
        batches(noise(8)).epoch(0, side=side)
