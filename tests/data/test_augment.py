"""Cutout and mixup against their definitions, and the options of a recipe."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from cnvzoo.data import Augmentation
from cnvzoo.data.augmentation import cutout_, mix, mixed_targets


@pytest.mark.parametrize(("side", "chans"), [(1, 3), (2, 1), (5, 3), (8, 3)])
def test_cutout_fills_the_square_and_nothing_else(side: int, chans: int) -> None:
    g = torch.Generator().manual_seed(side)
    images = torch.randint(100, (64, 8, 8, chans), generator=g, dtype=torch.uint8)
    rows, cols = torch.arange(64) // 8, torch.arange(64) % 8  # every centre
    fill = torch.tensor([200, 210, 220][:chans], dtype=torch.uint8)
    expected = images.clone()
    for i, (row, col) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
        top, left = row - side // 2, col - side // 2
        expected[i, max(top, 0) : top + side, max(left, 0) : left + side] = fill
    assert torch.equal(cutout_(images.clone(), rows, cols, side, fill), expected)


def test_mixup_is_the_convex_combination() -> None:
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    partner = torch.tensor([3, 0, 5, 1, 4, 2])
    out = mix(x, partner, torch.tensor(0.3))
    torch.testing.assert_close(out, 0.3 * x + 0.7 * x[partner])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mix(x, partner, torch.tensor(1.0)), x)
    assert torch.equal(mix(x, partner, torch.tensor(0.0)), x[partner])


def test_mixed_targets_share_the_probability() -> None:
    labels, partner = torch.tensor([0, 2, 2, 1]), torch.tensor([1, 2, 0, 3])
    targets = mixed_targets(labels, partner, torch.tensor(0.75), 4)
    assert targets.dtype == torch.float32
    expected = [[0.75, 0, 0.25, 0], [0, 0, 1, 0], [0.25, 0, 0.75, 0], [0, 1, 0, 0]]
    assert torch.equal(targets, torch.tensor(expected))


@pytest.mark.parametrize(
    "values",
    [
        {"crop_padding": -1},
        {"crop_padding": 4.0},
        {"crop_padding": True},
        {"cutout": -8},
        {"flip": 1},
        {"flip": "yes"},
        {"mixup": -0.1},
        {"mixup": float("nan")},
        {"mixup": float("inf")},
        {"mixup": "1"},
        {"rotate": True},
    ],
)
def test_impossible_augmentation_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        Augmentation.model_validate(values)


def test_augmentation_is_off_by_default_and_cannot_be_changed() -> None:
    augmentation = Augmentation()
    assert not any(augmentation.model_dump().values())
    assert Augmentation.model_validate({"mixup": 1}).mixup == 1.0  # YAML writes 1 for 1.0
    with pytest.raises(ValidationError, match="frozen"):
        augmentation.flip = True
