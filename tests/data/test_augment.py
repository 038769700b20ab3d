"""The augmentations of a finished batch, each against a direct statement of what it means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cnvzoo.data import Augmentation
from cnvzoo.data.augmentation import cutmix_box, cutout_, mix, mixed_targets


@pytest.mark.parametrize("side", [1, 2, 5, 8])
@pytest.mark.parametrize("chans", [1, 3])
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


NO_BOX = torch.zeros(4)


def test_mixup_is_the_convex_combination() -> None:
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    partner = torch.tensor([3, 0, 5, 1, 4, 2])
    out = mix(x, partner, torch.tensor(0.3), NO_BOX)
    torch.testing.assert_close(out, 0.3 * x + 0.7 * x[partner])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mix(x, partner, torch.tensor(1.0), NO_BOX), x)
    assert torch.equal(mix(x, partner, torch.tensor(0.0), NO_BOX), x[partner])


def test_cutmix_pastes_the_partners_box() -> None:
    x = torch.arange(5.0)[:, None, None, None].expand(5, 1, 8, 8).clone()
    out = mix(x, torch.tensor([1, 2, 3, 4, 0]), torch.tensor(1.0), torch.tensor([2.0, 6.0, 0.0, 3.0]))
    for i in range(5):
        assert (out[i, 0, 2:6, :3] == (i + 1) % 5).all()
        assert (out[i] == i).sum() == 64 - 12


@settings(deadline=None)
@given(
    size=st.sampled_from([28, 32]),
    lam=st.floats(0, 1),
    row=st.integers(0, 31),
    col=st.integers(0, 31),
)
def test_cutmix_box_lies_in_the_image_and_has_the_area_asked_for(size: int, lam: float, row: int, col: int) -> None:
    row, col = row % size, col % size
    top, bottom, left, right = cutmix_box(size, lam, row, col)
    assert 0 <= top <= bottom <= size
    assert 0 <= left <= right <= size
    area = (bottom - top) * (right - left)
    side = size * (1 - lam) ** 0.5
    assert area <= side**2 + 1e-9
    if side / 2 <= min(row, col, size - row, size - col):  # not cut off: the side is even, hence up to 2 short
        assert bottom - top == right - left
        assert side - 2 <= bottom - top <= side + 1e-9


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
        {"cutmix": float("inf")},
        {"cutmix": "1"},
        {"rotate": True},
    ],
)
def test_impossible_augmentation_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        Augmentation.model_validate(values)


def test_augmentation_defaults_to_nothing_and_cannot_be_changed() -> None:
    augmentation = Augmentation()
    assert not any(augmentation.model_dump().values())
    assert not augmentation.mixes
    assert Augmentation.model_validate({"cutmix": 1}).mixes  # YAML writes 1 for 1.0
    with pytest.raises(ValidationError, match="frozen"):
        augmentation.flip = True
