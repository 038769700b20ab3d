"""`cnvzoo_runtime.images`: one image of any size to a network's input, with torchvision and `cnvzoo.transforms`."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

import cnvzoo
from cnvzoo.data import Preprocessing, dataset_info
from cnvzoo.data.image_folders import read_image_folder
from cnvzoo_runtime.images import ImageError, normalize, prepare, read_image

MODES = ["RGB", "L", "RGBA", "P", "LA", "CMYK", "1"]


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height).integers(256, size=(height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("height", "width"),
    [(28, 28), (32, 32), (48, 64), (33, 500), (7, 9), (200, 31), (29, 28), (1, 20000), (19999, 1)],
)
@pytest.mark.parametrize(("mode", "in_chans"), [("RGB", 3), ("L", 1)])
def test_resize_and_crop_are_those_of_torchvision_for_pil_images(
    height: int, width: int, mode: str, in_chans: int
) -> None:
    image = noise(height, width, mode)
    expected = F.pil_to_tensor(F.center_crop(F.resize(cast(Any, image), [28]), [28]))
    assert torch.equal(torch.from_numpy(prepare(image, in_chans, 28, 28)), expected)
    padded = prepare(image, in_chans, 28, 32)
    assert torch.equal(torch.from_numpy(padded), F.pad(expected, [2]))


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1), (7, 9), (33, 500), (32, 32), (28, 28)])
@pytest.mark.parametrize("mode", MODES)
def test_with_and_without_torch_the_bits_are_equal(shape: tuple[int, int], mode: str) -> None:
    image = noise(*shape, mode)
    for dataset, normalized in (("cifar10", True), ("mnist", True), ("mnist", False)):
        info = dataset_info(dataset)
        preprocessing = Preprocessing.for_dataset(info, size=32, normalize=normalized)
        transform = cnvzoo.transforms(preprocessing)
        pixels = prepare(image, info.in_chans, info.image_size, 32)
        found = normalize(pixels[None], preprocessing.mean, preprocessing.std)[0]
        assert torch.equal(torch.from_numpy(found), transform(image))
        if mode in ("RGB", "L"):
            assert torch.equal(transform(F.pil_to_tensor(image)), transform(image))
            assert np.array_equal(prepare(np.asarray(image), info.in_chans, info.image_size, 32), pixels)


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_converted_through_rgb(mode: str) -> None:
    image = noise(32, 32, mode)
    if mode != "L":
        assert np.array_equal(prepare(image, 3, 32, 32), np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        assert np.array_equal(prepare(image, 1, 32, 32)[0], np.asarray(image.convert("RGB").convert("L")))
    else:
        assert np.array_equal(prepare(image, 3, 32, 32), np.stack([np.asarray(image)] * 3))


def test_a_very_long_image_is_not_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    resized: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *arguments: Any, **keywords: Any) -> Image.Image:
        resized.append(size)
        return resize(self, size, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "resize", noted)
    prepare(noise(1, 20000), 3, 32, 32)
    assert [width * height < 100_000 for width, height in resized] == [True]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), r"C 1 or 3, got shape \[8, 8, 4\]"),
        (np.zeros((8, 0, 3), np.uint8), r"got shape \[8, 0, 3\]"),
        (np.zeros((8, 8, 3), np.int64), "has to be uint8 .* got int64"),
        (Image.new("I", (8, 8)), "PIL mode 'I'"),
        (Image.new("I;16", (8, 8)), "PIL mode 'I;16'"),
        (Image.new("RGB", (8, 0)), "8x0"),
        ("photo.png", "got str"),
    ],
)
def test_images_of_other_than_8_bits_are_refused(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        prepare(image, 3, 32, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_are_turned_upright_as_their_exif_data_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photos" / "a" / f"photo.{suffix}"
    path.parent.mkdir(parents=True)
    noise(40, 30).save(path, exif=exif)
    stored = noise(40, 30)
    stored.getexif()[0x0112] = orientation
    expected = prepare(np.asarray(ImageOps.exif_transpose(stored)), 3, 32, 32)
    assert np.array_equal(prepare(read_image(path), 3, 32, 32), expected)
    transformed = cnvzoo.transforms(Preprocessing(32, (0.0,) * 3, (1.0,) * 3))(Image.open(path))  # not loaded yet
    assert np.array_equal((transformed.numpy() * 255).round(), expected)
    (tmp_path / "photos" / "b").mkdir()
    noise(32, 32).save(tmp_path / "photos" / "b" / "other.png")
    read = read_image_folder(tmp_path / "photos", size=32)
    assert np.array_equal(read.images["train"][0].transpose(2, 0, 1), expected)


def test_damaged_exif_data_is_ignored() -> None:
    image = noise(32, 32)
    expected = prepare(image, 3, 32, 32)
    image.info["exif"] = b"Exif\0\0not TIFF"
    assert np.array_equal(prepare(image, 3, 32, 32), expected)


def test_an_image_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    noise(32, 32).save(tmp_path / "x.png")
    for path in ("~/x.png", Path("~/x.png")):
        assert read_image(path).size == (32, 32)
    with pytest.raises(ImageError, match=r"^~no-such-user/x\.png: cannot be read as an image: Could not"):
        read_image("~no-such-user/x.png")


DAMAGED = {  # Pillow's errors for these are not of the usual classes, at opening and at loading
    "a.dds": b"DDS " + struct.pack("<I", 124) + bytes(120),
    "a.blp": b"BLP2" + struct.pack("<iBBBBII", 1, 7, 0, 0, 0, 8, 8) + bytes(2000),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images_of_any_format_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "photos" / "a" / name
    (tmp_path / "photos" / "b").mkdir(parents=True)
    noise(32, 32).save(tmp_path / "photos" / "b" / "0.png")
    path.parent.mkdir()
    path.write_bytes(DAMAGED[name])
    says = rf"{name}: cannot be read as an image: Unknown [^\n]*$"
    with pytest.raises(ImageError, match=says):
        read_image(path)
    with pytest.raises(cnvzoo.DatasetError, match=rf"{name}: cannot be read as an image: Unknown .*: repair or remove"):
        cnvzoo.load_dataset(tmp_path / "photos")


def test_an_opened_image_that_cannot_be_decoded_is_refused() -> None:
    without_palette = Image.new("P", (8, 8))
    without_palette.palette = None
    for image in (Image.open(io.BytesIO(DAMAGED["a.blp"])), without_palette):
        with pytest.raises(ImageError, match=r"^damaged, or not an image: \w+[^\n]*$"):
            prepare(image, 3, 32, 32)


def test_transparency_that_is_multiplied_in() -> None:
    image = Image.new("LA", (8, 8), (200, 51))
    assert (prepare(image.convert("La"), 1, 8, 8) == prepare(image, 1, 8, 8)).all()


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((2, 32, 32), "in_chans=2: 1 for grey or 3 for colour"),
        ((3, 29, 32), "images of 29 pixels cannot be padded equally to 32"),
        ((3, 32, 28), "images of 32 pixels cannot be padded equally to 28"),
        ((3, 0, 0), "images of 0 pixels"),
    ],
)
def test_channels_and_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int], says: str) -> None:
    with pytest.raises(ImageError, match=f"^{says}"):
        prepare(noise(32, 32), *sizes)


def ink(mode: str, color: int) -> Image.Image:
    """A square of `color` on a transparent ground of the same color; for P the ground is another index of it."""
    image = Image.new("LA", (28, 28), (color, 0))
    image.paste((color, 255), (10, 10, 18, 18))
    if mode == "P":
        palette = Image.new("P", (28, 28), 0)
        palette.putpalette([color] * 6)
        palette.paste(1, (10, 10, 18, 18))
        palette.info["transparency"] = 0
        return palette
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_white_ink_on_a_transparent_ground_is_white_on_black(mode: str, in_chans: int) -> None:
    expected = np.zeros((in_chans, 28, 28), np.uint8)
    expected[:, 10:18, 10:18] = 255
    assert np.array_equal(prepare(ink(mode, 255), in_chans, 28, 28), expected)
    with pytest.raises(ImageError, match="the image is black where it is not transparent"):
        prepare(ink(mode, 0), in_chans, 28, 28)


def test_half_transparent_pixels_are_half_as_bright() -> None:
    assert (prepare(Image.new("RGBA", (28, 28), (200, 100, 50, 51)), 3, 28, 28)[:, 0, 0] == [40, 20, 10]).all()
    assert not prepare(Image.new("RGBA", (28, 28), (200, 100, 50, 0)), 3, 28, 28).any()
