"""`Preprocessing` against torchvision's own operations, and `transforms` against `Preprocessing`, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.transforms.v2 import functional as F

from cnvzoo.data import DatasetError, Preprocessing, dataset_info, list_datasets, transforms
from cnvzoo.data.preprocessing import _row_constants
from cnvzoo_runtime.images import ImageError

CASES = [("mnist", True, 32), ("mnist", False, None), ("cifar10", True, None), ("cifar10", False, 40)]


def random_images(n: int, side: int, chans: int) -> Tensor:
    return torch.randint(256, (n, side, side, chans), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    array = image.numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


@pytest.mark.parametrize(("name", "normalize", "size"), CASES)
def test_equals_torchvision_and_transforms_bit_for_bit(name: str, normalize: bool, size: int | None) -> None:
    info = dataset_info(name)
    images = random_images(5, info.image_size, info.in_chans)
    preprocessing = Preprocessing.for_dataset(info, size=size, normalize=normalize)
    x = preprocessing(images)
    side = size or info.image_size
    assert x.shape == (5, info.in_chans, side, side)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)

    expected = F.pad(images.permute(0, 3, 1, 2), [(side - info.image_size) // 2] * 4)
    expected = F.to_dtype(expected, torch.float32, scale=True)
    if normalize:
        expected = F.normalize(expected, list(info.mean), list(info.std))
    assert torch.equal(x, expected)

    transform = transforms(preprocessing)
    for i, image in enumerate(images):
        for source in (to_pil(image), image.permute(2, 0, 1)):
            out = transform(source)
            assert type(out) is Tensor
            assert torch.equal(out, x[i])


@pytest.mark.parametrize("name", list_datasets())
def test_transforms_of_a_name_or_info_are_the_datasets_own(name: str) -> None:
    info = dataset_info(name)
    image = random_images(1, info.image_size, info.in_chans)
    expected = Preprocessing.for_dataset(info)(image)[0]
    assert torch.equal(transforms(name)(to_pil(image[0])), expected)
    assert torch.equal(transforms(info)(to_pil(image[0])), expected)


def test_unnormalised_input_is_the_8_bit_image_times_its_scale() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    x = Preprocessing(16, (0.0,), (1.0,))(levels)
    assert torch.equal(x.flatten(), torch.arange(256) * torch.tensor(1 / 255))
    assert torch.equal((x * 255).round().flatten().int(), torch.arange(256, dtype=torch.int32))


def test_padding_is_black_before_normalisation() -> None:
    x = Preprocessing(32, (0.25,), (0.5,), 28)(torch.full((1, 28, 28, 1), 255, dtype=torch.uint8))
    assert x[0, 0, 0, 0] == -0.5
    assert x[0, 0, 2, 2] == 1.5
    assert (x == 1.5).sum() == 28 * 28


def test_the_input_is_not_changed() -> None:
    images = random_images(2, 28, 1)
    copy = images.clone()
    Preprocessing.for_dataset(dataset_info("mnist"))(images)
    assert torch.equal(images, copy)


def test_a_view_of_a_larger_tensor_is_accepted() -> None:
    preprocessing = Preprocessing.for_dataset(dataset_info("cifar10"))
    images = random_images(6, 32, 3)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(preprocessing(planar[::2]), preprocessing(images)[::2])
    assert preprocessing(images[:0]).shape == (0, 3, 32, 32)


def test_an_image_of_another_size_is_resized_in_proportion_and_cropped() -> None:
    image = torch.zeros(3, 64, 128, dtype=torch.uint8)
    image[0, :, :32] = 255  # red on the left
    image[2, :, 96:] = 255  # blue on the right
    image[1, :, 32:96] = 200
    x = transforms(Preprocessing(32, (0.0,) * 3, (1.0,) * 3))(image)
    assert x.shape == (3, 32, 32)
    torch.testing.assert_close(x[:, :, 2:-2], torch.tensor([0, 200 / 255, 0])[:, None, None].expand(3, 32, 28))


def test_resize_is_antialiased_and_comes_before_padding() -> None:
    stripes = (torch.arange(280) // 2).remainder(2).mul(255).to(torch.uint8).expand(1, 280, 280)
    x = transforms(Preprocessing(32, (0.0,), (1.0,), 28))(stripes)
    assert (x[:, :2] == 0).all()
    assert ((x[0, 2:-2, 3:-3] - 0.5).abs() < 0.1).all()


def test_wrong_images_are_refused() -> None:
    transform = transforms("cifar10")
    with pytest.raises(ImageError, match="uint8"):
        transform(torch.zeros(3, 32, 32))
    with pytest.raises(ImageError, match=r"\[4, 32, 32\]"):
        transform(torch.zeros(4, 32, 32, dtype=torch.uint8))
    with pytest.raises(ImageError, match="got str"):
        transform("cat.png")
    with pytest.raises(ImageError, match="8-bit"):
        transform(Image.new("I;16", (32, 32)))
    with pytest.raises(DatasetError, match="svhn"):
        transforms("svhn")

    preprocessing = Preprocessing.for_dataset(dataset_info("cifar10"))
    with pytest.raises(TypeError, match="uint8"):
        preprocessing(torch.zeros(1, 32, 32, 3))
    for shape in ((1, 3, 32, 32), (1, 32, 32, 1), (32, 32, 3), (1, 32, 30, 3)):
        with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
            preprocessing(torch.zeros(shape, dtype=torch.uint8))
    for side in (33, 40, 31):
        with pytest.raises(ValueError, match=f"side {side} cannot be padded symmetrically to 32"):
            preprocessing(torch.zeros(1, side, side, 3, dtype=torch.uint8))


def test_impossible_values_are_refused() -> None:
    for size, mean, std, image_size in (
        (32, (0.5,), (0.5, 0.5, 0.5), None),
        (32, (0.5, 0.5), (0.5, 0.5), None),
        (32, (0.5,), (0.0,), None),
        (32, (float("nan"),), (0.5,), None),
        (0, (0.5,), (0.5,), None),
        (28, (0.5,), (0.5,), 32),
        (32, (0.5,), (0.5,), 27),
    ):
        with pytest.raises(ValueError, match=r"mean|std|size|padded"):
            Preprocessing(size, mean, std, image_size)
    wrong: list[Any] = [
        *((size, (0.5,), (0.5,), None) for size in (32.5, 28.0, True, "32", None)),
        *((32, (0.5,), (0.5,), image_size) for image_size in (28.0, True, "28", 0)),
        *((32, *values, None) for values in ((0.5, (0.5,)), ((0.5,), None), (("a",), (0.5,)), ([[0.5]], (0.5,)))),
    ]
    for values in wrong:
        with pytest.raises(ValueError, match=r"^(size|image_size|mean and std) must be .*\.$"):
            Preprocessing(*values)
        with pytest.raises(ValueError, match=r"^(size|image_size|mean and std) must be .*\.$"):
            Preprocessing.from_dict(dict(zip(("size", "mean", "std", "image_size"), values, strict=True)))


def test_sizes_of_numpy_are_written_as_json() -> None:
    sizes: Any = np.int64(32), np.uint8(28)
    preprocessing = Preprocessing(sizes[0], (0.5,), (0.5,), sizes[1])
    assert json.loads(json.dumps(preprocessing.to_dict())) == Preprocessing(32, (0.5,), (0.5,), 28).to_dict()


@pytest.mark.parametrize("first", ["a fake trace", "inference mode"])
def test_no_tensor_of_a_trace_or_of_inference_mode_is_kept_for_later_calls(first: str) -> None:
    images, preprocessing = random_images(2, 8, 3), Preprocessing(8, (0.123,), (0.5,))
    images = images[..., :1]
    _row_constants.cache_clear()
    if first == "a fake trace":
        make_fx(lambda x: preprocessing(x).mean(), tracing_mode="fake")(images)
    else:
        with torch.inference_mode():
            preprocessing(images)
    found = preprocessing(images)
    assert type(found) is Tensor
    assert not any(constant.is_inference() for constant in _row_constants(preprocessing, images.device))
    make_fx(lambda x: preprocessing(x).mean(), tracing_mode="fake")(images)  # nor do kept ones disturb a trace


def test_dict_form_survives_json() -> None:
    for name, normalize, size in CASES:
        preprocessing = Preprocessing.for_dataset(dataset_info(name), size=size, normalize=normalize)
        assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    with pytest.raises(ValueError, match="mode"):
        Preprocessing.from_dict({"size": 32, "mean": [0.5], "std": [0.5], "mode": "bilinear"})
    with pytest.raises(ValueError, match="std"):
        Preprocessing.from_dict({"size": 32, "mean": [0.5]})
