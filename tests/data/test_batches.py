"""`TrainBatches`: the right pixels, every image once, exact resumption, and no random numbers from outside its plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as F

from cnvzoo.data import Augmentation, Preprocessing, TrainBatches

RAW = {chans: Preprocessing(32, (0.0,) * chans, (1.0,) * chans) for chans in (1, 3)}
EVERYTHING = Augmentation(crop_padding=4, flip=True, cutout=8, mixup=0.4)


def noise(n: int, side: int = 32, chans: int = 3) -> Tensor:
    return torch.randint(256, (n, side, side, chans), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def make(images: Tensor, labels: Tensor | None = None, **changes: Any) -> TrainBatches:
    arguments: dict[str, Any] = {
        "num_classes": 256,
        "preprocessing": RAW[images.shape[3]],
        "augmentation": Augmentation(),
        "batch_size": 8,
        "seed": 0,
        "device": "cpu",
    }
    labels = torch.arange(len(images)) if labels is None else labels
    return TrainBatches(images, labels, **(arguments | changes))


def as_uint8(x: Tensor) -> Tensor:
    levels = x * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    return levels.round().to(torch.uint8)


@pytest.mark.parametrize("views", [None, 2])
def test_batches_do_not_depend_on_the_default_device(views: int | None) -> None:
    """The meta device has no values, and a generator of the CPU draws none for it."""
    images, labels = noise(24), torch.arange(24)
    augmentation = EVERYTHING.model_copy(update={"mixup": 0.0}) if views else EVERYTHING

    def batches() -> list[Tensor]:
        made = make(images, labels, augmentation=augmentation, views=views)
        shown = [*made.show(1, 8), *made.show(1, 8, 24)] if views else []
        return [*shown, *(t for side in (None, 24) for batch in made.epoch(1, side=side) for t in batch)]

    expected = batches()
    with torch.device("meta"):
        found = batches()
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (0, True), (31, False)])
def test_crop_and_flip_equal_torchvision(padding: int, flip: bool) -> None:
    images = noise(24)
    batches = make(images, augmentation=Augmentation(crop_padding=padding, flip=flip))
    plan = batches.plan(2)
    flips = 0
    for step, (x, labels) in enumerate(batches.epoch(2)):
        for i, (source, row, col, flip, *_) in enumerate(plan.rows[step].T.tolist()):
            planar = images[source].permute(2, 0, 1)
            padded = F.pad(planar, [padding] * 4, padding_mode="reflect") if padding else planar
            expected = F.crop(padded, row, col, 32, 32)
            if flip:
                expected = F.horizontal_flip(expected)
                flips += 1
            assert torch.equal(as_uint8(x[i]), expected)
            assert labels[i] == source
    assert (flips > 0) == flip


def test_offsets_and_flips_are_uniform() -> None:
    batches = make(
        noise(4096, 8, 1),
        torch.zeros(4096, dtype=torch.int64),
        preprocessing=Preprocessing(8, (0.0,), (1.0,)),
        augmentation=Augmentation(crop_padding=2, flip=True),
        batch_size=64,
    )
    _, row, col, flip, *_ = batches.plan(0).rows.unbind(1)
    cells = torch.bincount((row * 5 + col).flatten() * 2 + flip.flatten(), minlength=50).double()
    expected = 4096 / 50
    assert abs(((cells - expected) ** 2 / expected).sum() - 49) < 4 * 98**0.5


def test_zero_padding_comes_before_the_crop() -> None:
    images = torch.full((16, 28, 28, 1), 255, dtype=torch.uint8)
    preprocessing = Preprocessing(32, (0.0,), (1.0,), 28)
    x, _ = next(make(images, preprocessing=preprocessing, augmentation=Augmentation(crop_padding=2)).epoch(0))
    # the black frame is 2 wide, and the crop reflects 2 pixels at its outer edge
    corner = torch.nn.functional.pad(torch.ones(1, 1, 28, 28), (2, 2, 2, 2))
    windows = torch.nn.functional.pad(corner, (2, 2, 2, 2), mode="reflect").unfold(2, 32, 1).unfold(3, 32, 1)
    possible = windows.reshape(25, 32, 32)
    for image in x:
        assert any(torch.allclose(image[0], window) for window in possible)


def test_an_epoch_shows_every_image_once_and_reshuffles() -> None:
    images = noise(24)
    batches = make(images)
    assert batches.steps_per_epoch == 3
    orders = []
    for epoch in (0, 1):
        shown = [(as_uint8(x), y) for x, y in batches.epoch(epoch)]
        order = torch.cat([y for _, y in shown])
        assert sorted(order.tolist()) == list(range(24))
        assert torch.equal(torch.cat([x for x, _ in shown]).permute(0, 2, 3, 1), images[order])
        orders.append(order.tolist())
    assert orders[0] != orders[1] != list(range(24))


def test_partial_last_batch_is_dropped_and_differs_between_epochs() -> None:
    batches = make(noise(30))
    assert batches.steps_per_epoch == 3
    shown = [torch.cat([y for _, y in batches.epoch(e)]) for e in range(8)]
    assert all(len(y.unique()) == 24 for y in shown)
    assert len(torch.cat(shown).unique()) == 30


@pytest.mark.parametrize(("augmentation", "soft"), [(Augmentation(), False), (EVERYTHING, True)])
def test_form_of_a_batch(augmentation: Augmentation, soft: bool) -> None:
    preprocessing = Preprocessing(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    batches = make(noise(24), augmentation=augmentation, num_classes=30, preprocessing=preprocessing)
    for x, target in batches.epoch(0):
        assert x.shape == (8, 3, 32, 32)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        if soft:
            assert target.shape == (8, 30)
            assert target.dtype == torch.float32
            torch.testing.assert_close(target.sum(1), torch.ones(8))
        else:
            assert target.shape == (8,)
            assert target.dtype == torch.int64


def test_uint8_augmentations_keep_8_bit_values() -> None:
    augmentation = Augmentation(crop_padding=4, flip=True, cutout=8)
    for x, _ in make(noise(24), augmentation=augmentation).epoch(0):
        as_uint8(x)


def test_cutout_fills_with_the_mean_colour_of_the_set() -> None:
    images = noise(32) // 4
    images[..., 1:] = torch.tensor([255, 11], dtype=torch.uint8)
    images[::4, ..., 1:] = torch.tensor([252, 10], dtype=torch.uint8)
    mean = images.double().mean((0, 1, 2)).round().to(torch.uint8)
    assert mean[1:].tolist() == [254, 11]  # 254.25 and 10.75
    x, labels = next(make(images, augmentation=Augmentation(cutout=6)).epoch(0))
    x = as_uint8(x).permute(0, 2, 3, 1)
    changed = (x != images[labels]).any(3)
    assert (x[changed] == mean).all()
    assert changed.sum((1, 2)).min() >= 9
    assert changed.sum((1, 2)).max() <= 36


def test_targets_have_the_shares_of_the_images() -> None:
    # image k has level k everywhere and label k, so the level of a mixed image is the mean of its target
    levels = torch.arange(64, dtype=torch.uint8)
    images = levels[:, None, None, None].expand(64, 32, 32, 3)
    batches = make(images, augmentation=Augmentation(mixup=1.0), num_classes=64, batch_size=16)
    kept = []
    for epoch in range(5):
        for x, target in batches.epoch(epoch):
            torch.testing.assert_close(x.mean((1, 2, 3)) * 255, target @ levels.float(), rtol=1e-5, atol=1e-4)
            kept.append(float(target.max(1).values.min()))
    assert len(set(kept)) > 10


def test_lam_is_beta_distributed() -> None:
    batches = make(
        noise(1024, 8, 1),
        torch.zeros(1024, dtype=torch.int64),
        preprocessing=Preprocessing(8, (0.0,), (1.0,)),
        augmentation=Augmentation(mixup=0.2),
        batch_size=2,
    )
    lam = batches.plan(0).lam
    assert lam is not None
    assert lam.shape == (512,)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); four standard errors.
    assert abs(float(lam.mean()) - 0.5) < 4 * (1 / 5.6 / len(lam)) ** 0.5
    assert abs(float(lam.var()) - 1 / 5.6) < 0.03


def collect(batches: TrainBatches, epoch: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches.epoch(epoch, start))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_batches_depend_on_seed_epoch_and_step_alone() -> None:
    images = noise(40)
    batches = make(images, augmentation=EVERYTHING)
    whole = collect(batches, 3)
    torch.manual_seed(99)
    again = make(images, augmentation=EVERYTHING)
    collect(again, 7)
    for start in range(6):
        assert same(collect(again, 3, start), whole[start:])
    assert not same(collect(batches, 4), whole)
    assert not same(collect(make(images, augmentation=EVERYTHING, seed=1), 3), whole)
    # epoch 1 of seed 0 and epoch 0 of seed 1 differ
    assert not same(collect(make(images, seed=1), 0), collect(make(images, seed=0), 1))


def numpy_words() -> Any:
    return np.random.get_state(legacy=False)["state"]["key"]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch_state, numpy_state = torch.get_rng_state(), numpy_words()
    collect(make(noise(24), augmentation=EVERYTHING), 0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(numpy_words(), numpy_state)


def test_two_epochs_can_be_iterated_at_the_same_time() -> None:
    batches = make(noise(24), augmentation=EVERYTHING)
    pairs = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert same([a for a, _ in pairs], collect(batches, 0))
    assert same([b for _, b in pairs], collect(batches, 1))


def test_the_images_are_not_changed() -> None:
    images = noise(24)
    copy = images.clone()
    collect(make(images, augmentation=EVERYTHING), 0)
    assert torch.equal(images, copy)


class HostReads(TorchDispatchMode):
    """Records operations for which the host waits: reading a value, or a result whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_batch_waits_for_the_host() -> None:
    batches = make(noise(64), augmentation=EVERYTHING, batch_size=32)
    plan = batches.plan(0)
    with HostReads() as reads:
        for step in range(batches.steps_per_epoch):
            batches.make(plan, step)
    assert reads.found == []
    assert reads.operations > 50


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"images": torch.zeros(24, 32, 32, 3)}, TypeError, "uint8"),
        ({"images": torch.zeros(24, 32, 32, 1, dtype=torch.uint8), "preprocessing": RAW[3]}, ValueError, "C == 3"),
        ({"images": torch.zeros(24, 31, 31, 3, dtype=torch.uint8)}, ValueError, "padded symmetrically"),
        ({"labels": torch.zeros(24)}, TypeError, "integers"),
        ({"labels": torch.zeros(23, dtype=torch.int64)}, ValueError, "24 images"),
        ({"num_classes": 23}, ValueError, "0 to 22 for 23 classes, got 0 to 23"),
        ({"labels": torch.arange(24) - 1}, ValueError, "got -1 to 22"),
        ({"batch_size": 25}, ValueError, "batch_size must be 1 to 24"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 to 24"),
        ({"augmentation": Augmentation(crop_padding=32)}, ValueError, "crop_padding must be below the image side 32"),
        ({"augmentation": Augmentation(cutout=33)}, ValueError, "cutout must be at most the image side 32"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"images": noise(24), "labels": torch.arange(24), **changes}
    with pytest.raises(error, match=words):
        make(**arguments)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 4)])
def test_epoch_and_start_out_of_range_are_refused_at_the_call(epoch: int, start: int) -> None:
    with pytest.raises(ValueError, match=f"start of 0 to 3, got epoch {epoch}, start {start}"):
        make(noise(24)).epoch(epoch, start)


def test_a_plan_of_a_negative_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch of at least 0, got -1"):
        make(noise(24)).plan(-1)


def test_early_crops_below_the_cutout_are_refused() -> None:
    batches = make(noise(24), augmentation=Augmentation(cutout=12))
    next(batches.epoch(0, side=12))
    with pytest.raises(ValueError, match="cutout must be at most side, got a cutout of 12 and side 11"):
        batches.epoch(0, side=11)
