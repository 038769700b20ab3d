"""Facts of the datasets, the held-out split, and the real arrays where there are any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cnvzoo.data import Dataset, DatasetError, DatasetInfo, dataset_info, list_datasets, load_dataset

RealData = Callable[[str], Path]


def synthetic(labels: Tensor, num_classes: int) -> Dataset:
    """A dataset whose pixels hold the number of their image (two bytes), so that an image can be recognised."""
    n = len(labels)
    images = torch.zeros(n, 28, 28, 1, dtype=torch.uint8)
    images[:, 0, 0, 0] = (torch.arange(n) // 256).to(torch.uint8)
    images[:, 0, 1, 0] = (torch.arange(n) % 256).to(torch.uint8)
    info = DatasetInfo("synthetic", "Synthetic", tuple(map(str, range(num_classes))), 1, 28, (0.5,), (0.5,), n, 3)
    return Dataset(info, images, labels.to(torch.uint8), images[:3], labels[:3].to(torch.uint8))


def image_numbers(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() * 256 + images[:, 0, 1, 0].int()).tolist()


def test_facts_are_available_without_files(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("CNVZOO_DATA", str(tmp_path / "nowhere"))
    facts = {name: dataset_info(name) for name in list_datasets()}
    assert {n: (i.in_chans, i.image_size, i.num_classes, i.train_size, i.test_size) for n, i in facts.items()} == {
        "mnist": (1, 28, 10, 60_000, 10_000),
        "fashion_mnist": (1, 28, 10, 60_000, 10_000),
        "cifar10": (3, 32, 10, 50_000, 10_000),
        "cifar100": (3, 32, 100, 50_000, 10_000),
    }
    for info in facts.values():
        assert len(set(info.classes)) == info.num_classes
    # Labels of CIFAR-100 number its classes alphabetically.
    assert list(facts["cifar100"].classes) == sorted(facts["cifar100"].classes)
    assert facts["cifar10"].classes[3] == "cat"
    assert facts["fashion_mnist"].classes[9] == "Ankle boot"


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(DatasetError, match=r"'cifar-10'.*did you mean 'cifar10'"):
        load_dataset("cifar-10")
    with pytest.raises(DatasetError, match="mnist, fashion_mnist, cifar10, cifar100"):
        dataset_info("imagenet")


def test_arrays_that_do_not_fit_the_info_are_refused() -> None:
    good = synthetic(torch.arange(10), 10)
    with pytest.raises(DatasetError, match=r"train_images of synthetic must be uint8 \[10, 28, 28, 1\], not float32"):
        Dataset(good.info, good.train_images.float(), good.train_labels, good.test_images, good.test_labels)
    with pytest.raises(DatasetError, match=r"test_labels .* not uint8 \[2\]"):
        Dataset(good.info, good.train_images, good.train_labels, good.test_images, good.test_labels[:2])


def test_holdout_partitions_the_training_set_by_class() -> None:
    labels = torch.arange(300) % 3
    labels[labels == 2] = torch.where(torch.arange(100) < 50, 2, 1)  # 100, 150 and 50 of the three classes
    dataset = synthetic(labels, 3)
    split = dataset.holdout(60)
    assert torch.bincount(split.test_labels).tolist() == [20, 30, 10]
    assert (split.info.train_size, split.info.test_size) == (240, 60)
    kept, held = image_numbers(split.train_images), image_numbers(split.test_images)
    assert sorted(kept + held) == list(range(300))
    assert kept == sorted(kept)
    assert held == sorted(held)
    assert torch.equal(split.train_labels, dataset.train_labels[kept])
    assert torch.equal(split.test_labels, dataset.train_labels[held])
    # spread over the whole set
    assert min(held) < 15
    assert max(held) > 285


def test_holdout_is_fixed() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1])  # 4 and 8
    torch.manual_seed(1)
    first = image_numbers(synthetic(labels, 2).holdout(3).test_images)
    torch.manual_seed(2)
    assert image_numbers(synthetic(labels, 2).holdout(3).test_images) == first
    # Shares 1 and 2. The middle of class 0 (0, 3, 5, 8) is at 2; class 1 (1, 2, 4, 6, 7, 9, 10, 11) gives 2 and 6.
    assert first == [4, 5, 10]


@pytest.mark.parametrize("n", [1, 7, 11])
def test_holdout_takes_exactly_n_where_classes_do_not_divide(n: int) -> None:
    split = synthetic(torch.arange(12) % 5, 10).holdout(n)
    assert len(split.test_labels) == n
    assert len(split.train_labels) == 12 - n


@pytest.mark.parametrize("n", [0, 12, 5.0, "5", True])
def test_holdout_refuses_an_empty_side_and_other_types(n: object) -> None:
    with pytest.raises(ValueError, match=rf"^holdout\({n!r}\): .*expected a whole number from 1 to 11$"):
        synthetic(torch.arange(12) % 5, 10).holdout(n)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list_datasets())
def test_real_training_set_has_the_mean_std_and_classes_stated(name: str, real_data: RealData) -> None:
    dataset = load_dataset(name, root=real_data(name))
    chans = dataset.info.in_chans
    histogram = torch.stack(
        [torch.bincount(dataset.train_images[..., c].flatten(), minlength=256) for c in range(chans)]
    )
    share = histogram.double() / histogram.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * level).sum(1)
    std = (share * (level - mean[:, None]) ** 2).sum(1).sqrt()
    assert tuple(round(v, 4) for v in mean.tolist()) == dataset.info.mean
    assert tuple(round(v, 4) for v in std.tolist()) == dataset.info.std
    assert len(torch.unique(dataset.train_labels)) == dataset.info.num_classes
    assert len(torch.unique(dataset.test_labels)) == dataset.info.num_classes


def test_real_holdout_is_balanced(real_data: RealData) -> None:
    split = load_dataset("cifar10", root=real_data("cifar10")).holdout(5000)
    assert torch.bincount(split.test_labels).tolist() == [500] * 10
    assert torch.bincount(split.train_labels).tolist() == [4500] * 10
