"""A user's own images: from folders, arrays and files, with bad ones named."""

from __future__ import annotations

import errno
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnvzoo.data import Dataset, DatasetError, dataset_info, datasets, image_folders, load_dataset, published
from cnvzoo.data.image_folders import default_side
from cnvzoo_runtime.images import prepare


def write(path: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes with train and test images of several sizes."""
    root = tmp_path / "my photos"
    for split, count in (("train", 4), ("test", 2)):
        for n in range(count):
            write(root / split / "red" / f"{n}.png", (200 + n, 0, 0), (40 + n, 50))
            write(root / split / "blue" / "deep" / f"{n}.jpg", (0, 0, 200), (64, 40))
    (root / "train" / "red" / "notes.txt").write_text("not an image")
    write(root / "train" / "red" / ".hidden.png", (0, 255, 0))
    return root


def test_a_folder_with_train_and_test(photos: Path) -> None:
    data = load_dataset(photos)
    assert data.info.classes == ("blue", "red")  # in alphabetical order
    assert (data.info.name, data.info.image_size, data.info.in_chans) == ("my_photos", 32, 3)
    assert data.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.train_images[4:, 5, 5].tolist() == [[200 + n, 0, 0] for n in range(4)]  # in the order of their paths
    blue, red = 200 / 255, (200 + 201 + 202 + 203) / 4 / 255
    assert data.info.mean[0] == pytest.approx(red / 2, abs=0.004)
    assert data.info.mean[2] == pytest.approx(blue / 2, abs=0.004)  # JPEG
    assert data.info.std[1] == pytest.approx(0, abs=0.01)


def test_images_are_resized_as_predict_does(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    for name in ("a", "b"):
        for n in range(5):
            write(tmp_path / name / f"{n}.png", n)
    Image.fromarray(noise).save(tmp_path / "a" / "0.png")
    data = load_dataset(tmp_path, size=24, in_chans=3)
    expected = prepare(Image.fromarray(noise), 3, 24, 24).transpose(1, 2, 0)
    images = torch.cat([data.train_images, data.test_images]).numpy()
    assert any((image == expected).all() for image in images)


def test_one_level_is_split_by_class(tmp_path: Path) -> None:
    for name, level in (("x", 10), ("y", 20)):
        for n in range(10):
            write(tmp_path / name / f"{n}.png", level + n, (28, 28))
    data = load_dataset(tmp_path)
    assert (data.info.image_size, data.info.in_chans) == (28, 1)  # the size that all share; all are grey
    assert (data.info.train_size, data.info.test_size) == (16, 4)
    assert data.test_images[:, 0, 0, 0].tolist() == [12, 17, 22, 27]  # evenly spaced within each class
    assert data.info.mean == (pytest.approx(data.train_images.double().mean().item() / 255, abs=5e-5),)


def test_images_of_one_square_size_above_1024_have_the_default_size(tmp_path: Path) -> None:
    for name in ("x", "y"):
        for n in range(5):
            write(tmp_path / name / f"{n}.png", n, (1025, 1025))
    assert load_dataset(tmp_path).info.image_size == 32


def test_bad_files_are_named(photos: Path) -> None:
    (photos / "train" / "red" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (photos / "test" / "blue" / "html.jpg").write_text("<html>")
    with pytest.raises(DatasetError, match=r"red/cut\.png: cannot be read as an image: .*: repair or remove"):
        load_dataset(photos)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: write(root / "train" / "green" / "0.png", 0), "test has no images of 'green'"),
        (lambda root: (root / "empty").mkdir(), None),
    ],
)
def test_splits_have_the_same_classes(photos: Path, change, message: str | None) -> None:
    change(photos)
    if message is None:
        assert load_dataset(photos).info.num_classes == 2
        return
    with pytest.raises(DatasetError, match=message):
        load_dataset(photos)


def test_a_class_without_images_is_named(photos: Path) -> None:
    (photos / "train" / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"/train: class 'empty' has no images: add some, or remove the folder$"):
        load_dataset(photos / "train")
    (photos / "train" / "none").mkdir()
    says = r"/train: classes 'empty', 'none' have no images: add some, or remove the folders$"
    with pytest.raises(DatasetError, match=says):
        load_dataset(photos / "train")


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no images found: expected <class>/<image>, or train/<class>/<image>"):
        load_dataset(tmp_path)
    with pytest.raises(DatasetError, match="no such file or folder"):
        load_dataset(tmp_path / "nowhere")
    write(tmp_path / "only" / "0.png", 0)
    with pytest.raises(DatasetError, match="only one class, 'only'"):
        load_dataset(tmp_path)


def test_arrays(tmp_path: Path) -> None:
    images = np.arange(10, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    data = Dataset.from_arrays(
        images, [0, 1] * 5, ["even", "odd"], test_images=images[:2], test_labels=np.array([0, 1])
    )
    assert data.train_images.shape == (10, 8, 8, 1)
    assert data.info.mean == (round(4.5 / 255, 4),)
    data.save(tmp_path / "digits.safetensors")
    again = load_dataset(tmp_path / "digits.safetensors")
    assert again.info == data.info
    assert again.sha256 == data.sha256
    assert load_dataset(str(tmp_path / "digits.safetensors")).info.classes == ("even", "odd")


def test_arrays_that_torch_does_not_take_as_they_are(tmp_path: Path) -> None:
    """Colours in reverse, unsigned labels, read-only memory, and test images that are the training images."""
    images = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    expected = Dataset.from_arrays(torch.from_numpy(images.copy()), [0, 1] * 3, "ab")
    images.flags.writeable = False
    for dtype in (np.uint16, np.uint32, np.uint64):
        data = Dataset.from_arrays(images[..., ::-1][..., ::-1], np.array([0, 1] * 3, dtype), "ab")
        assert data.sha256 == expected.sha256
    for unsigned in (torch.uint16, torch.uint32, torch.uint64):
        assert Dataset.from_arrays(images, torch.tensor([0, 1] * 3).to(unsigned), "ab").sha256 == expected.sha256
    backwards = Dataset.from_arrays(images[..., ::-1], [0, 1] * 3, "ab")
    assert torch.equal(backwards.train_images, expected.train_images.flip(3))

    pixels, labels = torch.from_numpy(images.copy()), torch.tensor([0, 1] * 3)
    data = Dataset.from_arrays(pixels, labels, "ab", test_images=pixels, test_labels=labels)
    data.save(tmp_path / "same.safetensors")
    assert load_dataset(tmp_path / "same.safetensors").sha256 == data.sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.zeros((6, 8, 8), np.float32)}, "images must be uint8 (0 to 255), got torch.float32"),
        ({"images": np.zeros((6, 8, 9), np.uint8)}, "images must be square"),
        ({"images": np.zeros((6, 2, 8, 8), np.uint8)}, "images must be square"),
        ({"labels": [0, 1, 2, 0, 1, 2]}, "labels are 0 to 2, and 2 classes were given"),
        ({"labels": [0, 1, 0]}, "labels must be [6], got shape [3]"),
        ({"labels": [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]}, "labels must be whole numbers"),
        ({"labels": ["a", "b"] * 3}, "labels must be whole numbers from 0 to 1, the positions in classes: "),
        ({"labels": np.array(["a", "b"] * 3)}, "labels must be whole numbers from 0 to 1, the positions in classes: "),
        ({"labels": [0, None] * 3}, "labels must be whole numbers from 0 to 1, the positions in classes: "),
        ({"images": [["a"]]}, "images must be an array of uint8, [N, H, W, C]: "),
        ({"images": np.zeros((6, 1025, 1025), np.uint8)}, "images have a side of 1025 pixels, and at most 1024 are"),
        ({"classes": ["a"]}, "classes must be 2 to 256 different names, got 1"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"name": "cifar10"}, "other than mnist"),
        ({"classes": [["a"], ["b"]]}, "own: classes must be 2 to 256 different names"),
        ({"classes": 2}, "own: classes must be 2 to 256 different names"),
        ({"name": "../x"}, "give a name of letters"),
        ({"name": 5}, "name=5: give a name of letters"),
        ({"test_images": np.zeros((2, 8, 8), np.uint8)}, "give test_images and test_labels, or neither"),
    ],
)
def test_impossible_arrays_are_refused(arguments: dict, message: str) -> None:
    given = {"images": np.zeros((6, 8, 8), np.uint8), "labels": [0, 1] * 3, "classes": ["a", "b"]} | arguments
    with pytest.raises(DatasetError, match=re.escape(message)):
        Dataset.from_arrays(**given)


def test_a_file_that_is_not_a_dataset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"short")
    with pytest.raises(DatasetError, match="not a complete safetensors file"):
        load_dataset(path)


def test_the_size_of_a_benchmark_dataset_is_fixed() -> None:
    with pytest.raises(DatasetError, match="size and in_chans are for folders of own images"):
        load_dataset("mnist", size=32)


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "eval"), ("train", "dev"), ("Train", "Test")])
def test_splits_of_other_names_are_not_taken_for_classes(photos: Path, names: tuple[str, str]) -> None:
    for split, name in zip(("train", "test"), names, strict=True):
        (photos / split).rename(photos / name)
    with pytest.raises(DatasetError) as error:
        load_dataset(photos)
    shown = ", ".join(repr(name) for name in sorted(names))
    assert str(error.value) == (
        f"{photos}: {shown} look like splits of a dataset and not like classes: name its splits 'train' and 'test', "
        "and move other folders away"
    )


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    for name in ("dev", "prod"):
        for n in range(5):
            write(tmp_path / name / f"{n}.png", n)
    assert load_dataset(tmp_path).info.classes == ("dev", "prod")


def test_links_to_folders_are_followed_once(photos: Path, tmp_path: Path) -> None:
    write(tmp_path / "more" / "0.png", (1, 2, 3))
    (photos / "train" / "red" / "more").symlink_to(tmp_path / "more")
    (photos / "train" / "red" / "loop").symlink_to(photos / "train" / "red")
    (tmp_path / "more" / "back").symlink_to(photos / "train" / "red")
    assert load_dataset(photos).train_labels.tolist() == [0] * 4 + [1] * 5


@pytest.mark.parametrize("size", [32.0, "32", True, 0, 1025])
def test_an_impossible_size_is_refused(photos: Path, size: object) -> None:
    with pytest.raises(DatasetError, match=rf"^size={size!r}: a whole number of pixels from 1 to 1024$"):
        load_dataset(photos, size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_chans", [1.0, True, "1", 2])
def test_impossible_channels_are_refused(photos: Path, in_chans: object) -> None:
    with pytest.raises(DatasetError, match=rf"^in_chans={in_chans!r}: 1 for grey or 3 for RGB$"):
        load_dataset(photos, in_chans=in_chans)  # type: ignore[arg-type]


def test_a_folder_of_the_name_that_was_given_is_pointed_out(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    with pytest.raises(DatasetError, match=r"^unknown dataset 'train': .*; the folder or file here is './train'$"):
        load_dataset("train")
    with pytest.raises(DatasetError, match=r"^unknown dataset '\./train': Choices: mnist, [^;]*$"):
        dataset_info("./train")  # a path already


def test_arrays_are_on_the_cpu_whatever_the_default_device() -> None:
    images, labels = np.arange(10 * 64, dtype=np.uint8).reshape(10, 8, 8), [0, 1] * 5
    expected = Dataset.from_arrays(images, labels, ["a", "b"])
    with torch.device("meta"):
        data = Dataset.from_arrays(images, labels, ["a", "b"])
    assert data.sha256 == expected.sha256


@pytest.mark.parametrize("name", ["", "cat\u200b", "a\nb", "x" * 201])
def test_classes_that_no_checkpoint_could_have_are_refused(name: str) -> None:
    with pytest.raises(DatasetError, match=r"^own: class .*: give printable text of 1 to 200 characters$"):
        Dataset.from_arrays(np.zeros((10, 8, 8), np.uint8), [0, 1] * 5, ["a", name])


def test_a_link_that_leads_nowhere_is_named(photos: Path) -> None:
    (photos / "train" / "red" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DatasetError, match=r"red/gone\.png: .*No such file.*: repair or remove them$"):
        load_dataset(photos)


def test_the_only_image_of_a_class_is_trained_on(tmp_path: Path) -> None:
    for name in "abcde":
        write(tmp_path / name / "0.png", 1, (8, 8))
    for n in range(100):
        write(tmp_path / "many" / f"{n}.png", 2, (8, 8))
    data = load_dataset(tmp_path)
    assert data.train_labels.bincount().tolist() == [1, 1, 1, 1, 1, 79]
    assert data.test_labels.bincount().tolist() == [0, 0, 0, 0, 0, 21]


def test_the_default_side_is_found_without_reading_images(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folders, "read_image", None)
    assert default_side(photos) == 32
    for n, path in enumerate(sorted(photos.glob("t*/*/**/*.[pj][np]g"))):
        Image.new("RGB", (20, 20), (n, 0, 0)).save(path)
    assert default_side(photos) == 20


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_dataset_has_images_and_labels_of_its_classes(split: str) -> None:
    info = replace(dataset_info("mnist"), train_size=2, test_size=2)
    arrays = {f"{s}_{key}": torch.zeros(2, *shape, dtype=torch.uint8)
              for s in ("train", "test") for key, shape in (("images", (28, 28, 1)), ("labels", ()))}  # fmt: skip
    Dataset(info, **arrays)
    labels = torch.tensor([0, 10], dtype=torch.uint8)
    with pytest.raises(DatasetError, match=f"^{split}_labels of mnist are up to 10, and it has 10 classes: labels are"):
        Dataset(info, **arrays | {f"{split}_labels": labels})
    empty = {f"{split}_{key}": arrays[f"{split}_{key}"][:0] for key in ("images", "labels")}
    with pytest.raises(DatasetError, match=f"^mnist has no {split} images: give at least one$"):
        Dataset(replace(info, **{f"{split}_size": 0}), **arrays | empty)


@pytest.mark.parametrize(("key", "value"), [("mean", math.nan), ("std", math.inf), ("std", 0.0)])
def test_a_saved_dataset_with_impossible_statistics_is_refused(tmp_path: Path, key: str, value: float) -> None:
    images = torch.randint(256, (10, 8, 8, 1), dtype=torch.uint8)
    data = Dataset.from_arrays(images, [0, 1] * 5, ["a", "b"])
    replace(data, info=replace(data.info, **{key: (value,)})).save(path := tmp_path / "x.safetensors")
    with pytest.raises(DatasetError, match=r"x\.safetensors: its metadata 'cnvzoo' is damaged: mean and std"):
        load_dataset(path)


def test_a_file_that_cannot_be_opened_is_not_taken_for_a_missing_one(tmp_path: Path, monkeypatch) -> None:
    """safetensors says of every failure to open a file that there is no such file."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (path := tmp_path / "mnist.safetensors").touch()
    for module in (datasets, published):
        monkeypatch.setattr(module, "check_readable", refuse)
    with pytest.raises(DatasetError, match=r"mnist\.safetensors: cannot be read: Permission denied: change its"):
        load_dataset(path)
    with pytest.raises(DatasetError, match=r"mnist\.safetensors cannot be read: Permission denied\. Change its"):
        load_dataset("mnist", root=tmp_path)
    assert path.exists()
