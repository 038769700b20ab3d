"""A folder of images as arrays: `train/<class>/*` and `test/<class>/*`, or one level of classes that is split here.

Images are read by Pillow, turned upright by their EXIF orientation, and resized once, by the same code as the images
that a trained model classifies (`cnvzoo_runtime.images.prepare`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cnvzoo.errors import DatasetError
from cnvzoo.progress import counted
from cnvzoo_runtime.images import ImageError, prepare, read_image

LARGEST_SIDE = 1024  # pixels; a checkpoint has no larger input
DEFAULT_SIDE = 32  # pixels, of images that do not share one square size
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_SPLIT_NAMES = (*_TEST_FOLDERS, "train", "training", "testing", "eval", "evaluation", "dev")
_NAMED = 5  # bad files that an error names
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "F")
_TOGETHER = 64  # images that are read between two reports of progress


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    Attributes:
        classes: names of the classes, in alphabetical order, which is that of the labels.
        images, labels: uint8 [N, side, side, C] and uint8 [N], by split: `train` and `test`, or `train` alone where
            the folder has only one level.
    """

    classes: tuple[str, ...]
    images: dict[str, NDArray[np.uint8]]
    labels: dict[str, NDArray[np.uint8]]


def default_side(root: Path) -> int:
    """The side in pixels that `read_image_folder(root)` makes, from the headers of the files alone.

    Raises:
        DatasetError: there are no images, or the folder has other names of splits.
    """
    return _format([path for folders in _splits(root).values() for paths in folders.values() for path in paths])[0]


def read_image_folder(root: Path, *, size: int | None = None, in_chans: int | None = None) -> ImageFolder:
    """Read all images of `root`.

    The folder holds `train/<class>/*` and `test/<class>/*` (also `val`, `valid` or `validation`), or `<class>/*`
    without splits, as torchvision's `ImageFolder` reads it: files at any depth below a class, symbolic links
    followed, in the order of their paths. Files with another suffix than those of images, and hidden ones, are ignored.

    Args:
        root: the folder.
        size: side of the square images to make, in pixels; default: the side that all images share, if they are square
            and of one size, else 32.
        in_chans: 1 for grey or 3 for RGB; default 1 if all images are grey, else 3.

    Raises:
        DatasetError: there are no images or only those of one class; the splits have other classes, or other names
            than these; or files cannot be read: the message names them.
    """
    splits = _splits(root)
    classes = tuple(sorted({name for folders in splits.values() for name in folders}))
    for split, folders in splits.items():
        lacking = [name for name in classes if not folders.get(name)]
        if lacking and len(splits) == 1:
            what = ("class", "has", "folder") if len(lacking) == 1 else ("classes", "have", "folders")
            raise DatasetError(
                f"{root}: {what[0]} {_listed(lacking)} {what[1]} no images: add some, or remove the {what[2]}"
            )
        if lacking:
            raise DatasetError(f"{root}: {split} has no images of {_listed(lacking)}: every split needs every class")
    if len(classes) < 2:
        raise DatasetError(
            f"{root}: only one class, {', '.join(classes)!r}: a classifier needs a folder for each of several"
        )
    if len(classes) > 256:
        raise DatasetError(f"{root}: {len(classes)} classes: labels are 8-bit numbers, so at most 256 are possible")
    paths = {split: [path for name in classes for path in folders[name]] for split, folders in splits.items()}
    side, channels = _format([path for found in paths.values() for path in found])
    images = {
        split: _read(found, size or side, in_chans or channels, f"{root.name}: {split} images")
        for split, found in paths.items()
    }
    labels = {
        split: np.repeat(np.arange(len(classes), dtype=np.uint8), [len(folders[name]) for name in classes])
        for split, folders in splits.items()
    }
    return ImageFolder(classes, images, labels)


def _splits(root: Path) -> dict[str, dict[str, list[Path]]]:
    """The image files of each class of each split."""
    folders = {path.name: path for path in _visible(root) if path.is_dir()}
    tests = [name for name in _TEST_FOLDERS if name in folders]
    if "train" in folders and tests:
        return {"train": _classes(folders["train"]), "test": _classes(folders[tests[0]])}
    if "train" in folders and len(folders) == 1:
        return {"train": _classes(folders["train"])}
    splits = [name for name in folders if name.lower() in _SPLIT_NAMES]
    if splits and any(path.is_dir() for name in splits for path in _visible(folders[name])):
        raise DatasetError(
            f"{root}: {_listed(splits)} look like splits of a dataset and not like classes: name its splits 'train' "
            "and 'test', and move other folders away"
        )
    return {"train": _classes(root)}


def _classes(folder: Path) -> dict[str, list[Path]]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = {
        path.name: [file for file in _files(path) if file.suffix.lower() in suffixes]
        for path in _visible(folder)
        if path.is_dir()
    }
    if not any(found.values()):
        raise DatasetError(
            f"{folder}: no images found: expected <class>/<image>, or train/<class>/<image> and test/<class>/<image>"
        )
    return found


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read: {error.strerror}") from None


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files at any depth below a folder, but for hidden ones, in the order of their paths."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    for path in _visible(folder):
        if path.is_dir():
            yield from _files(path, (*above, real))
        elif path.is_file() or path.is_symlink():  # reading a link that leads nowhere is an error that names it
            yield path


def _format(paths: Sequence[Path]) -> tuple[int, int]:
    """The default side and number of channels, from the headers of the files; unreadable ones are left to `_read`."""
    sizes: set[tuple[int, int]] = set()
    grey = True
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
                grey = grey and image.mode in _GREY_MODES
        except Exception:  # Pillow's errors are of many classes, one for each format
            continue
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    return (width if width == height <= LARGEST_SIDE else DEFAULT_SIDE), (1 if grey else 3)


def _read(paths: Sequence[Path], side: int, channels: int, name: str) -> NDArray[np.uint8]:
    images = np.empty((len(paths), side, side, channels), np.uint8)
    bad: list[str] = []

    def read(index: int) -> str | None:
        try:
            image = read_image(paths[index])
        except ImageError as error:  # it names the file
            return str(error)
        try:
            images[index] = prepare(image, channels, side, side).transpose(1, 2, 0)
        except ImageError as error:
            return f"{paths[index]}: {error}"
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
        for start in counted(range(0, len(paths), _TOGETHER), name):
            bad += filter(None, pool.map(read, range(start, min(start + _TOGETHER, len(paths)))))
    if bad:
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise DatasetError(f"{'; '.join(bad[:_NAMED])}{more}: repair or remove them")
    return images


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
