"""The four benchmark datasets: their facts, and their images and labels as uint8 tensors from a verified cache.

Images are [N, H, W, C] uint8 in their published order. What turns them into network inputs is in
`cnvzoo.data.preprocessing` and `cnvzoo.data.batches`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cnvzoo.errors import CnvzooError, nearest
from cnvzoo.files import expanded

# for each dataset, array name -> {"shape", "dtype", "sha256"}
CHECKSUMS: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("checksums.json").read_text(encoding="utf-8")
)
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class DatasetError(CnvzooError, ValueError):
    """A dataset that is unknown, cannot be loaded, or has other data than it should."""


@dataclass(frozen=True)
class DatasetInfo:
    """The facts about a dataset.

    Attributes:
        name: the name that `load_dataset` takes.
        title: the name for readers, such as "CIFAR-10".
        classes: names of the classes, in the order of the labels.
        in_chans: channels of an image, 1 or 3.
        image_size: height and width of an image in pixels.
        mean, std: of the training pixels, for each channel, for pixels in [0, 1].
        train_size, test_size: numbers of images.
        huggingface_id: its id among the datasets of the Hugging Face Hub, if it is there.
        torchvision_class: the class of `torchvision.datasets` that downloads it.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    in_chans: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    huggingface_id: str | None = None
    torchvision_class: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)


# in the order of the labels, which is alphabetical
_CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

# in the order of `list_datasets`
DATASETS: Mapping[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="mnist",
            title="MNIST",
            classes=tuple("0123456789"),
            in_chans=1,
            image_size=28,
            mean=(0.1307,),
            std=(0.3081,),
            train_size=60_000,
            test_size=10_000,
            huggingface_id="ylecun/mnist",
            torchvision_class="MNIST",
        ),
        DatasetInfo(
            name="fashion_mnist",
            title="Fashion-MNIST",
            classes=(
                *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
            in_chans=1,
            image_size=28,
            mean=(0.2860,),
            std=(0.3530,),
            train_size=60_000,
            test_size=10_000,
            huggingface_id="zalando-datasets/fashion_mnist",
            torchvision_class="FashionMNIST",
        ),
        DatasetInfo(
            name="cifar10",
            title="CIFAR-10",
            classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            in_chans=3,
            image_size=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            train_size=50_000,
            test_size=10_000,
            huggingface_id="uoft-cs/cifar10",
            torchvision_class="CIFAR10",
        ),
        DatasetInfo(
            name="cifar100",
            title="CIFAR-100",
            classes=tuple(_CIFAR100_CLASSES.split()),
            in_chans=3,
            image_size=32,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            train_size=50_000,
            test_size=10_000,
            huggingface_id="uoft-cs/cifar100",
            torchvision_class="CIFAR100",
        ),
    )
}


def list_datasets() -> list[str]:
    """The names that `load_dataset` takes."""
    return list(DATASETS)


def dataset_info(name: str) -> DatasetInfo:
    """The facts about a dataset; needs neither its files nor the network.

    Raises:
        DatasetError: no such dataset.
    """
    if name not in DATASETS:
        raise DatasetError(f"unknown dataset {name!r}: {nearest(name, DATASETS)}")
    return DATASETS[name]


def published_sha256(name: str) -> str:
    """`Dataset.sha256` of the published dataset; needs neither its files nor the network.

    Raises:
        DatasetError: no such dataset.
    """
    dataset_info(name)
    return _combined({key: CHECKSUMS[name][key]["sha256"] for key in _ARRAYS})


def _combined(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{key} {digest}\n" for key, digest in digests.items()).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training set and a test set in memory: images uint8 [N, H, W, C], labels uint8 [N].

    The tensors are shared, not copied: do not write to them.

    Raises:
        DatasetError: arrays whose shape or dtype is not what `info` says.
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

    @property
    def sha256(self) -> str:
        """sha256, in hexadecimal, of the contents of the four arrays."""
        return _combined({key: sha256_of_array(getattr(self, key)) for key in _ARRAYS})

    def holdout(self, n: int) -> Dataset:
        """Split `n` training images off as a test set, to choose recipes without reading the real test set.

        The split depends on `n` and the labels only: each class gives its share of `n` (rounded by largest remainders),
        evenly spaced over the class in the published order. No random numbers are involved, so the split is the same
        under every seed and library version.

        Raises:
            DatasetError: `n` is not from 1 to len(train_images) - 1.
        """
        if not 0 < n < len(self.train_labels):
            raise DatasetError(
                f"holdout({n}): {self.info.name} has {len(self.train_labels)} training images, and at least one must "
                f"be left on either side: expected 1 to {len(self.train_labels) - 1}, got {n}"
            )
        held = torch.zeros(len(self.train_labels), dtype=torch.bool)
        for members, share in zip(*_shares(self.train_labels, n), strict=True):
            held[members[(torch.arange(share) * 2 + 1) * len(members) // (2 * share)]] = True
        return Dataset(
            replace(self.info, train_size=len(held) - n, test_size=n),
            self.train_images[~held],
            self.train_labels[~held],
            self.train_images[held],
            self.train_labels[held],
        )


def _shares(labels: Tensor, n: int) -> tuple[list[Tensor], list[int]]:
    """The indices of the images of each class, and how many of them a stratified sample of `n` takes."""
    classes = [torch.nonzero(labels == label).squeeze(1) for label in torch.unique(labels)]
    shares = [len(members) * n // len(labels) for members in classes]
    by_remainder = sorted(range(len(classes)), key=lambda c: (-(len(classes[c]) * n % len(labels)), c))
    for c in by_remainder[: n - sum(shares)]:
        shares[c] += 1
    kept = [c for c, share in enumerate(shares) if share]
    return [classes[c] for c in kept], [shares[c] for c in kept]


def load_dataset(name: str, *, root: str | Path | None = None) -> Dataset:
    """Load a dataset from the cache; on first use torchvision downloads it into the cache.

    Args:
        name: one of `list_datasets()`.
        root: the folder of the cache; default `$CNVZOO_DATA`, else `~/.cache/cnvzoo/datasets`.

    Raises:
        DatasetError: unknown name; or the cache has no data with the published checksums, and none can be downloaded.
    """
    info = dataset_info(name)
    return Dataset(info, **load_arrays(name, expanded(root) if root is not None else default_root()))


def default_root() -> Path:
    """The folder of the cache: `$CNVZOO_DATA`, else `~/.cache/cnvzoo/datasets`."""
    return expanded(os.environ.get("CNVZOO_DATA") or "~/.cache/cnvzoo/datasets")


def load_arrays(name: str, root: Path) -> dict[str, Tensor]:
    """The four arrays of a dataset, with the published checksums, downloaded into `root` if they are not there.

    A cached file that fails its check is renamed to `<file>.corrupt`, with a warning, and downloaded again.

    Raises:
        DatasetError: the cache has no data with the published checksums, and the download failed; the message says
            what was wrong with a cached file, and what to do.
    """
    path = root / f"{name}.safetensors"
    arrays, _ = _read(name, path)
    if arrays is not None:
        return arrays
    try:
        root.mkdir(parents=True, exist_ok=True)
        # one process downloads; the others wait here and then read what it has written
        with FileLock(root / f".{name}.lock"):
            return _read_or_download(name, path)
    except OSError as error:
        raise DatasetError(
            f"{name} cannot be written to the dataset cache {root}: {error}. {_remedy(name, path)}"
        ) from error


def _read_or_download(name: str, path: Path) -> dict[str, Tensor]:
    arrays, problem = _read(name, path)
    if arrays is not None:
        return arrays
    reason = f"{path} is not in the dataset cache"
    if problem is not None:
        aside = path.with_name(f"{path.name}.corrupt")
        os.replace(path, aside)
        reason = f"the cached {path} was refused ({problem}) and renamed to {aside.name}"
        warnings.warn(f"{name}: {reason}; downloading it again.", stacklevel=4)
    scratch = path.with_name(f".{name}.fetch")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed: this one holds the lock
    scratch.mkdir()
    try:
        arrays = _download(name, scratch)
        problem = _mismatch(name, arrays)
        if problem is not None:
            raise DatasetError(f"torchvision delivered other data than the published set: {problem}")
        _write(arrays, scratch / path.name, path)
    except DatasetError as error:
        raise DatasetError(f"{name}: {reason}, and downloading it failed: {error}. {_remedy(name, path)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return arrays


def _remedy(name: str, path: Path) -> str:
    return (
        f"Try again with a network connection, or place a verified {name}.safetensors at {path}, "
        "or point CNVZOO_DATA (or root=) at a directory that holds one."
    )


def _read(name: str, path: Path) -> tuple[dict[str, Tensor] | None, str | None]:
    """(arrays, None), or (None, what is wrong with the file), or (None, None) where there is no file."""
    try:
        arrays = load_file(path)
    except FileNotFoundError:
        return None, None
    except PermissionError as error:
        raise DatasetError(f"{path} cannot be read: {error}. Change its permissions, or use another root.") from error
    except (OSError, SafetensorError) as error:
        return None, f"not a complete safetensors file: {error}"
    problem = _mismatch(name, arrays)
    return ({key: arrays[key] for key in CHECKSUMS[name]}, None) if problem is None else (None, problem)


def _mismatch(name: str, arrays: dict[str, Tensor]) -> str | None:
    """How arrays differ from the published ones; None where they do not."""
    for key, expected in CHECKSUMS[name].items():
        if key not in arrays:
            return f"it holds no array {key!r}"
        array = arrays[key]
        if list(array.shape) != expected["shape"] or array.dtype != torch.uint8:
            return f"{key} is {array.dtype} {list(array.shape)}, expected torch.uint8 {expected['shape']}"
        digest = sha256_of_array(array)
        if digest != expected["sha256"]:
            return f"sha256 of {key} is {digest}, expected {expected['sha256']}"
    return None


def sha256_of_array(array: Tensor) -> str:
    """sha256, in hexadecimal, of the bytes of a tensor on the CPU in row-major order."""
    return hashlib.sha256(array.contiguous().numpy().data).hexdigest()


def _download(name: str, scratch: Path) -> dict[str, Tensor]:
    class_name = dataset_info(name).torchvision_class
    assert class_name is not None
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DatasetError(f"torchvision, which downloads it, does not import ({error})") from error
    arrays: dict[str, Tensor] = {}
    for split in ("train", "test"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy warns of CIFAR's pickles
                source = getattr(datasets, class_name)(str(scratch / "download"), train=split == "train", download=True)
        except Exception as error:  # of many classes, from DNS to a mirror's error page, with one remedy
            raise DatasetError(f"torchvision's download raised {type(error).__name__}: {error}") from error
        images = torch.as_tensor(source.data)
        arrays[f"{split}_images"] = (images if images.ndim == 4 else images.unsqueeze(-1)).contiguous()
        arrays[f"{split}_labels"] = torch.as_tensor(source.targets, dtype=torch.uint8)
    return arrays


def _write(arrays: dict[str, Tensor], temporary: Path, path: Path) -> None:
    with temporary.open("wb") as file:
        file.write(save(arrays))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
