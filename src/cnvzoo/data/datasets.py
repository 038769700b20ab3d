"""Datasets in memory, as uint8 tensors: those of the benchmark, and a user's own from folders, files and arrays.

What turns images into network inputs is in `cnvzoo.data.preprocessing` and `cnvzoo.data.batches`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cnvzoo.data import published
from cnvzoo.data.image_folders import LARGEST_SIDE, read_image_folder
from cnvzoo.data.published import ARRAYS, DatasetInfo, combined_sha256, dataset_info, default_root, list_datasets
from cnvzoo.errors import DatasetError, in_a_line
from cnvzoo.files import check_readable, expanded, replacing
from cnvzoo_runtime.metadata import is_printable, whole_number


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training set and a test set in memory: images uint8 [N, H, W, C], labels uint8 [N].

    The tensors are shared, not copied: do not write to them. `load_dataset` and `Dataset.from_arrays` make one.

    Raises:
        DatasetError: arrays whose shape or dtype is not what `info` says, or that are empty; or labels that are no
            class of `info`.
    """

    info: DatasetInfo
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        image = (self.info.image_size, self.info.image_size, self.info.in_chans)
        for split, images, labels, size in (
            ("train", self.train_images, self.train_labels, self.info.train_size),
            ("test", self.test_images, self.test_labels, self.info.test_size),
        ):
            for key, array, shape in (("images", images, (size, *image)), ("labels", labels, (size,))):
                if array.dtype != torch.uint8 or tuple(array.shape) != shape:
                    raise DatasetError(
                        f"{split}_{key} of {self.info.name} must be uint8 {list(shape)}, "
                        f"not {str(array.dtype).removeprefix('torch.')} {list(array.shape)}"
                    )
            if size < 1:
                raise DatasetError(f"{self.info.name} has no {split} images: give at least one")
            if (largest := int(labels.max())) >= self.info.num_classes:
                raise DatasetError(
                    f"{split}_labels of {self.info.name} are up to {largest}, and it has {self.info.num_classes} "
                    f"classes: labels are 0 to {self.info.num_classes - 1}"
                )

    @classmethod
    def from_arrays(
        cls,
        images: Tensor | NDArray[np.uint8],
        labels: Tensor | NDArray[np.integer[Any]] | Sequence[int],
        classes: Sequence[str],
        *,
        test_images: Tensor | NDArray[np.uint8] | None = None,
        test_labels: Tensor | NDArray[np.integer[Any]] | Sequence[int] | None = None,
        name: str = "own",
    ) -> Dataset:
        """A dataset of a user's own images.

        Mean and standard deviation are those of the training images, rounded to four decimals.

        Args:
            images: uint8, square: [N, H, W, C] with C 1 or 3, or [N, H, W] of grey ones.
            labels: N whole numbers from 0 to len(classes) - 1.
            classes: names of the classes in the order of the labels, 2 to 256.
            test_images, test_labels: the same for the test set. By default a fifth of the images is split off, by the
                rule of `holdout`.
            name: letters, digits, `_` and `-`; names checkpoints and exported files.

        Raises:
            DatasetError: an array has another dtype or shape, a label is out of range, or the name of a class cannot be
                printed.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in list_datasets():
            raise DatasetError(
                f"name={name!r}: give a name of letters, digits, _ and -, other than {', '.join(list_datasets())}"
            )
        names = tuple(classes) if isinstance(classes, Iterable) else (classes,)
        if not all(isinstance(n, str) for n in names) or not 2 <= len(names) <= 256 or len(set(names)) < len(names):
            raise DatasetError(f"{name}: classes must be 2 to 256 different names, got {len(names)}: {names[:5]}")
        if bad := [n for n in names if not n or len(n) > _LONGEST_CLASS or not is_printable(n)]:
            raise DatasetError(f"{name}: class {bad[0]!r}: give printable text of 1 to {_LONGEST_CLASS} characters")
        train = _own_split(name, "", images, labels, len(names))
        if (test_images is None) != (test_labels is None):
            raise DatasetError(f"{name}: give test_images and test_labels, or neither")
        if test_images is None or test_labels is None:
            count = len(train[0])
            if count < 5:
                raise DatasetError(f"{name}: {count} images: a fifth is split off for testing, so give at least 5")
            held = _held_out(train[1], count // 5)
            train, test = (train[0][~held], train[1][~held]), (train[0][held], train[1][held])
        else:
            test = _own_split(name, "test_", test_images, test_labels, len(names))
            if test[0].shape[1:] != train[0].shape[1:]:
                shapes = (list(part.shape[1:]) for part in (train[0], test[0]))
                raise DatasetError("{}: images are {} and test_images {}: make them the same".format(name, *shapes))
        return cls(_own_info(name, names, train[0], len(test[0])), *train, *test)

    def save(self, path: str | Path) -> None:
        """Write arrays, classes and the other facts to a safetensors file, which `load_dataset(path)` reads.

        Raises:
            FileError: the file cannot be written; an existing one is kept.
        """
        facts = {"name": self.info.name, "title": self.info.title, "classes": list(self.info.classes)}
        facts |= {"mean": list(self.info.mean), "std": list(self.info.std)}
        arrays = {key: getattr(self, key).contiguous() for key in ARRAYS}
        # test images may be some of the training images, and safetensors refuses tensors that share memory
        arrays |= {key: arrays[key].clone() for key in ("test_images", "test_labels")}
        content = save(arrays, {_FACTS: json.dumps(facts)})
        with replacing(expanded(path)) as temporary:
            temporary.write_bytes(content)

    @property
    def sha256(self) -> str:
        """sha256, in hexadecimal, of the contents of the four arrays."""
        return combined_sha256({key: published.sha256_of_array(getattr(self, key)) for key in ARRAYS})

    def holdout(self, n: int) -> Dataset:
        """Split `n` training images off as a test set, to choose recipes without reading the real test set.

        The split depends on `n` and the labels only: each class gives its share of `n` (rounded by largest remainders,
        but for classes that would give their last image), evenly spaced over the class in the published order. No
        random numbers are involved, so the split is the same under every seed and library version.

        Raises:
            DatasetError: `n` is not from 1 to len(train_images) - 1.
        """
        number = whole_number(n)
        if number is None or not 0 < number < len(self.train_labels):
            raise DatasetError(
                f"holdout({n!r}): {self.info.name} has {len(self.train_labels)} training images, and at least one must "
                f"be left on either side: expected a whole number from 1 to {len(self.train_labels) - 1}"
            )
        held = _held_out(self.train_labels, number)
        return Dataset(
            replace(self.info, train_size=len(held) - number, test_size=number),
            self.train_images[~held],
            self.train_labels[~held],
            self.train_images[held],
            self.train_labels[held],
        )


def _held_out(labels: Tensor, n: int) -> Tensor:
    """Which images `Dataset.holdout(n)` takes: bool [N]."""
    held = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for members, share in zip(*_shares(labels, n), strict=True):
        held[members[(torch.arange(share, device="cpu") * 2 + 1) * len(members) // (2 * share)]] = True
    return held


def _shares(labels: Tensor, n: int) -> tuple[list[Tensor], list[int]]:
    """The indices of the images of each class, and how many of them a stratified sample of `n` takes."""
    classes = [torch.nonzero(labels == label).squeeze(1) for label in torch.unique(labels)]
    shares = [len(members) * n // len(labels) for members in classes]
    takes_all = [share + 1 >= len(members) for share, members in zip(shares, classes, strict=True)]
    by_remainder = sorted(range(len(classes)), key=lambda c: (takes_all[c], -(len(classes[c]) * n % len(labels)), c))
    for c in by_remainder[: n - sum(shares)]:
        shares[c] += 1
    kept = [c for c, share in enumerate(shares) if share]
    return [classes[c] for c in kept], [shares[c] for c in kept]


_LONGEST_CLASS = 200  # characters of a name, as in a checkpoint
_FACTS = "cnvzoo"  # key of the metadata of a file that Dataset.save wrote
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", re.ASCII)


def _own_split(name: str, prefix: str, images: Any, labels: Any, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images [N, H, W, C] and labels [N] as uint8 tensors, after checks."""
    pixels = _as_tensor(images, f"{name}: {prefix}images must be an array of uint8, [N, H, W, C]")
    if pixels.dtype != torch.uint8:
        raise DatasetError(f"{name}: {prefix}images must be uint8 (0 to 255), got {pixels.dtype}")
    pixels = pixels.unsqueeze(-1) if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2] or pixels.shape[3] not in (1, 3) or 0 in pixels.shape:
        raise DatasetError(
            f"{name}: {prefix}images must be square, [N, H, W, C] with C 1 or 3, or [N, H, W], got shape "
            f"{list(np.shape(images))}"
        )
    if pixels.shape[1] > LARGEST_SIDE:
        raise DatasetError(
            f"{name}: {prefix}images have a side of {pixels.shape[1]} pixels, and at most {LARGEST_SIDE} are allowed: "
            "resize them"
        )
    numbers = _as_tensor(
        labels, f"{name}: {prefix}labels must be whole numbers from 0 to {num_classes - 1}, the positions in classes"
    )
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise DatasetError(f"{name}: {prefix}labels must be whole numbers, got {numbers.dtype}")
    if numbers.shape != (len(pixels),):
        raise DatasetError(f"{name}: {prefix}labels must be [{len(pixels)}], got shape {list(numbers.shape)}")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= num_classes:
        raise DatasetError(f"{name}: {prefix}labels are {low} to {high}, and {num_classes} classes were given")
    return pixels.contiguous(), numbers.to(torch.uint8)


def _as_tensor(values: Any, expected: str) -> Tensor:
    """The values as a tensor; DatasetError, with what is expected, where they are not numbers of one shape."""
    if isinstance(values, np.ndarray) and (not values.flags.writeable or min(values.strides, default=0) < 0):
        values = values.copy()  # torch takes neither
    try:
        tensor = torch.as_tensor(values, device="cpu")
        # torch has few operations for these
        return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DatasetError(f"{expected}: {in_a_line(error)}") from None


def _own_info(name: str, classes: tuple[str, ...], images: Tensor, test_size: int) -> DatasetInfo:
    counts = torch.stack([torch.bincount(images[..., c].reshape(-1), minlength=256) for c in range(images.shape[3])])
    levels = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    mean = (counts * levels).sum(1) / counts.sum(1)
    std = ((counts * (levels - mean[:, None]) ** 2).sum(1) / counts.sum(1)).sqrt()
    return DatasetInfo(
        name=name,
        title=name,
        classes=classes,
        in_chans=images.shape[3],
        image_size=images.shape[1],
        mean=tuple(round(value, 4) for value in mean.tolist()),
        std=tuple(max(round(value, 4), 1e-4) for value in std.tolist()),  # images of one colour have 0
        train_size=len(images),
        test_size=test_size,
    )


def is_dataset_path(source: str | Path) -> bool:
    """Whether this is a path of own images, not a name: a Path, or text with a separator or ending in .safetensors.

    Raises:
        DatasetError: it is neither text nor a Path.
    """
    if not isinstance(source, (str, Path)):
        raise DatasetError(f"{source!r}: a dataset is given by its name, which is text, or by its path")
    separators = [s for s in (os.sep, os.altsep) if s]
    return isinstance(source, Path) or source.endswith(".safetensors") or any(s in source for s in separators)


def load_dataset(
    source: str | Path, *, root: str | Path | None = None, size: int | None = None, in_chans: int | None = None
) -> Dataset:
    """Load a dataset: one of the benchmark by name, or a user's own images by path.

    A dataset of the benchmark is read from the cache; on first use torchvision downloads it into the cache.

    Own images are a folder `train/<class>/*` and `test/<class>/*` (also `val`, `valid`, `validation`), or `<class>/*`,
    as torchvision's `ImageFolder` has it, of which a fifth is split off for testing by the rule of `Dataset.holdout`;
    or a file that `Dataset.save` wrote. Images of a folder are turned upright by their EXIF orientation, converted to 1
    or 3 channels, resized once, with the centre cropped, and kept as uint8.

    Args:
        source: one of `list_datasets()`; or a path: a Path, or text with a separator or that ends in .safetensors.
        root: the folder of the cache; default `$CNVZOO_DATA`, else `~/.cache/cnvzoo/datasets`.
        size: for a folder, height and width of the images in pixels, 1 to 1024; default the size that all its images
            share if they are square and have at most 1024 pixels a side, else 32.
        in_chans: for a folder, 1 for grey or 3 for RGB; default 1 if all its images are grey, else 3.

    Raises:
        DatasetError: unknown name; the cache has no data with the published checksums, and none can be downloaded; or
            files of own images are missing, not images, or not a dataset: the message names them.
    """
    if not is_dataset_path(source):
        if size is not None or in_chans is not None:
            raise DatasetError(f"{source}: size and in_chans are for folders of own images: leave them out")
        info = dataset_info(str(source))
        return Dataset(info, **published.load_arrays(info.name, expanded(root) if root is not None else default_root()))
    if size is not None:
        side = whole_number(size)
        if side is None or not 1 <= side <= LARGEST_SIDE:
            raise DatasetError(f"size={size!r}: a whole number of pixels from 1 to {LARGEST_SIDE}")
        size = side
    if in_chans is not None:
        channels = whole_number(in_chans)
        if channels not in (1, 3):
            raise DatasetError(f"in_chans={in_chans!r}: 1 for grey or 3 for RGB")
        in_chans = channels
    path = expanded(source)
    if path.is_dir():
        found = read_image_folder(path, size=size, in_chans=in_chans)
        return Dataset.from_arrays(
            found.images["train"], found.labels["train"], found.classes, name=dataset_path_name(path),
            test_images=found.images.get("test"), test_labels=found.labels.get("test"),
        )  # fmt: skip
    if size is not None or in_chans is not None:
        raise DatasetError(f"{path}: size and in_chans are for folders of own images: leave them out")
    return _read_saved(path)


def dataset_path_name(source: str | Path) -> str:
    """The name of the dataset at a path: that of the folder or file, with other characters than names have as `_`."""
    stem = Path(os.path.abspath(expanded(source))).name.removesuffix(".safetensors")
    name = re.sub(r"[^A-Za-z0-9_-]", "_", stem).lstrip("-")[:60] or "own"
    return f"own_{name}" if name in list_datasets() else name


def _read_saved(path: Path) -> Dataset:
    """The dataset in a file that `Dataset.save` wrote, or in one of the cache of the benchmark's."""
    try:
        check_readable(path)
        with safe_open(path, framework="pt") as file:
            metadata, arrays = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{path}: no such file or folder: give images in a folder <class>/*, or a file") from None
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read: {error.strerror}: change its permissions, or give another"
        ) from None
    except SafetensorError as error:
        raise DatasetError(f"{path}: not a complete safetensors file: {error}") from None
    if _FACTS not in metadata and path.stem in list_datasets():
        if problem := published.mismatch(path.stem, arrays):
            raise DatasetError(f"{path}: {problem}")
        return Dataset(dataset_info(path.stem), **{key: arrays[key] for key in ARRAYS})
    if _FACTS not in metadata or not arrays.keys() >= set(ARRAYS):
        raise DatasetError(f"{path}: not a dataset that Dataset.save wrote: no metadata {_FACTS!r}, or arrays missing")
    try:
        facts = json.loads(metadata[_FACTS])
        classes, name = tuple(map(str, facts["classes"])), str(facts["name"])
        if name in list_datasets():  # for example a held-out split of one
            name = f"own_{name}"
        data = Dataset.from_arrays(
            arrays["train_images"], arrays["train_labels"], classes, name=name,
            test_images=arrays["test_images"], test_labels=arrays["test_labels"],
        )  # fmt: skip
        mean, std = (tuple(float(value) for value in facts[key]) for key in ("mean", "std"))
        if (
            not len(mean) == len(std) == data.info.in_chans
            or not all(map(math.isfinite, mean))
            or not all(0 < s < math.inf for s in std)
        ):
            raise ValueError("mean and std do not fit the images")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DatasetError(f"{path}: its metadata {_FACTS!r} is damaged: {error}") from None
    return replace(data, info=replace(data.info, title=str(facts.get("title", name)), mean=mean, std=std))
