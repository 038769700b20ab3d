"""TrivialAugmentWide against torchvision's: the same pixels for each operation and magnitude, the same draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide

from cnvzoo.data import Augmentation, Preprocessing, TrainBatches, trivial_augment

REFERENCE = TrivialAugmentWide()
OPERATIONS = list(TrivialAugmentWide._AUGMENTATION_SPACE)
# torchvision blends with a multiply-add that a CPU may or may not fuse, so a value within one float32 rounding of a
# whole number may fall to either side of it: one grey level.
BLENDED = {"Color", "Contrast", "Sharpness"}
# Nearest neighbours of turned grids: a source position within rounding of the middle between two pixels may go to
# either, and the reference's matrix product does not fix its order of summation.
TURNED = {"ShearX", "ShearY", "Rotate"}


def sample_images(side: int, chans: int) -> Tensor:
    """Noise, gradients, a half-flat picture, low contrast, and constant images: uint8 [N, S, S, C]."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, side, side, chans), generator=g, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, side)[None, :, None, None].expand(1, side, side, chans).to(torch.uint8)
    half = noise[:1].clone()
    half[:, : side // 2] = 0
    low = 100 + noise[1:2] // 8
    constant = torch.tensor([0, 77, 255], dtype=torch.uint8)[:, None, None, None].expand(3, side, side, chans)
    return torch.cat([noise, ramp, ramp.transpose(1, 2), half, low, constant])


def ours(images: Tensor, operation: str, magnitude: float) -> Tensor:
    operations = torch.full((1, len(images)), trivial_augment.OPERATIONS.index(operation))
    magnitudes = torch.full((1, len(images)), magnitude, dtype=torch.float64)
    parameters = trivial_augment.parameters(operations, magnitudes, images.shape[1])[0]
    return trivial_augment.apply_(images.clone(), parameters, trivial_augment.counts(operations)[0])


def theirs(images: Tensor, operation: str, magnitude: float) -> Tensor:
    planar = images.permute(0, 3, 1, 2).contiguous()
    out = [
        REFERENCE._apply_image_or_video_transform(x, operation, magnitude, REFERENCE.interpolation, REFERENCE._fill)
        for x in planar
    ]
    return torch.stack([torch.as_tensor(x) for x in out]).permute(0, 2, 3, 1)


def reference_magnitudes(operation: str) -> list[float]:
    magnitudes, signed = TrivialAugmentWide._AUGMENTATION_SPACE[operation]
    values = magnitudes(31, 32, 32)
    if values is None:
        return [0.0]
    return [sign * float(v) for v in values for sign in ((1, -1) if signed else (1,))]


@pytest.mark.parametrize(("side", "chans"), [(32, 3), (28, 1)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_equals_torchvision(operation: str, side: int, chans: int) -> None:
    images = sample_images(side, chans)
    values = reference_magnitudes(operation)
    changed = False
    for magnitude in values if len(values) < 32 else values[:4] + values[4:-4:7] + values[-4:]:
        out, expected = ours(images, operation, magnitude), theirs(images, operation, magnitude)
        difference = (out.int() - expected.int()).abs()
        if operation in BLENDED:
            assert difference.max() <= 1, magnitude
            assert difference.ne(0).float().mean() < 0.005, magnitude
        elif operation in TURNED:
            assert difference.ne(0).float().mean() < 0.0005, magnitude
        else:
            assert torch.equal(out, expected), magnitude
        changed |= not torch.equal(out, images)
    assert changed == (operation != "Identity" and (operation, chans) != ("Color", 1))


def test_a_mixed_batch_is_its_images_one_by_one() -> None:
    images = sample_images(32, 3).repeat(6, 1, 1, 1)
    operations, magnitudes = trivial_augment.draw((1, len(images)), torch.Generator().manual_seed(1))
    parameters = trivial_augment.parameters(operations, magnitudes, 32)[0]
    out = trivial_augment.apply_(images.clone(), parameters, trivial_augment.counts(operations)[0])
    assert len(operations.unique()) == len(OPERATIONS)
    for i in range(len(images)):
        one = ours(images[i : i + 1], OPERATIONS[int(operations[0, i])], float(magnitudes[0, i]))
        assert torch.equal(out[i], one[0])


def reference_draws(n: int) -> Counter[tuple[str, float]]:
    """What torchvision's own forward chooses, n times."""
    seen: Counter[tuple[str, float]] = Counter()

    def record(image: Any, transform_id: str, magnitude: float, **_: Any) -> Any:
        seen[transform_id, round(magnitude, 5) + 0.0] += 1
        return image

    recorder, image = TrivialAugmentWide(), torch.zeros(3, 4, 4, dtype=torch.uint8)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "_apply_image_or_video_transform", record)
        torch.manual_seed(0)
        for _ in range(n):
            recorder(image)
    return seen


def test_draws_equal_torchvisions_in_distribution() -> None:
    n = 15_000
    expected = reference_draws(n)
    operations, magnitudes = trivial_augment.draw((n // 100, 100), torch.Generator().manual_seed(0))
    assert torch.equal(operations, operations.sort(dim=1).values)
    names = [OPERATIONS[i] for i in operations.flatten().tolist()]
    drawn = Counter(zip(names, [round(m, 5) + 0.0 for m in magnitudes.flatten().tolist()], strict=True))
    assert drawn.keys() == expected.keys()
    # Two-sample chi-square over all (operation, signed magnitude) with equal sample sizes: mean df, variance 2 df.
    statistic = sum((drawn[k] - expected[k]) ** 2 / (drawn[k] + expected[k]) for k in expected)
    df = len(expected) - 1
    assert abs(statistic - df) < 4 * (2 * df) ** 0.5
    signed = magnitudes[magnitudes.ne(0) & (operations >= 1) & (operations <= 9)]
    assert abs(signed.gt(0).double().mean() - 0.5) < 4 * 0.5 / len(signed) ** 0.5
    # And over the operations alone, where a small bias shows more.
    by_operation = torch.bincount(operations.flatten(), minlength=14).double()
    assert ((by_operation - n / 14) ** 2 / (n / 14)).sum() < 13 + 4 * 26**0.5


def test_sorting_ties_no_operation_to_an_image() -> None:
    n, epochs = 28, 300
    batches = TrainBatches(
        torch.zeros(n, 4, 4, 1, dtype=torch.uint8),
        torch.zeros(n, dtype=torch.uint8),
        num_classes=1,
        preprocessing=Preprocessing(4, (0.0,), (1.0,)),
        augmentation=Augmentation(trivial_augment=True),
        batch_size=14,
        seed=0,
        device="cpu",
    )
    table = torch.zeros(n, 14, dtype=torch.float64)
    for epoch in range(epochs):
        plan = batches.plan(epoch)
        assert plan.trivial is not None
        for images, counts in zip(plan.rows[:, 0], plan.trivial[1], strict=True):
            operations = torch.arange(14).repeat_interleave(torch.tensor(counts))
            table.index_put_((images, operations), torch.ones(14, dtype=torch.float64), accumulate=True)
    expected = epochs / 14
    df = n * 13
    assert abs(((table - expected) ** 2 / expected).sum() - df) < 4 * (2 * df) ** 0.5
