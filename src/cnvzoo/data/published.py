"""The four datasets of the benchmark: their facts, and their arrays from a cache of verified files.

Images are [N, H, W, C] uint8 in their published order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cnvzoo.errors import DatasetError, nearest
from cnvzoo.files import check_readable, expanded, replacing

# for each dataset, array name -> {"shape", "dtype", "sha256"}
CHECKSUMS: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("checksums.json").read_text(encoding="utf-8")
)
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class DatasetInfo:
    """The facts about a dataset.

    Attributes:
        name: the name that `load_dataset` takes; for a user's own images, letters, digits, `_` and `-`.
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
        is_here = name and os.path.basename(name) == name and os.path.exists(name)
        here = f"; the folder or file here is './{name}'" if is_here else ""
        raise DatasetError(f"unknown dataset {name!r}: {nearest(name, DATASETS)}{here}")
    return DATASETS[name]


def published_sha256(name: str) -> str:
    """`Dataset.sha256` of the published dataset; needs neither its files nor the network.

    Raises:
        DatasetError: no such dataset.
    """
    dataset_info(name)
    return combined_sha256({key: CHECKSUMS[name][key]["sha256"] for key in ARRAYS})


def combined_sha256(digests: Mapping[str, str]) -> str:
    """`Dataset.sha256` from the sha256 of each array, by name."""
    return hashlib.sha256("".join(f"{key} {digest}\n" for key, digest in digests.items()).encode()).hexdigest()


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
            f"{name} cannot be written to the dataset cache {root}: {error.strerror}. Free some space or allow writing "
            "there, or point CNVZOO_DATA (or root=) at another directory."
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
        problem = mismatch(name, arrays)
        if problem is not None:
            raise DatasetError(f"torchvision delivered other data than the published set: {problem}")
        with replacing(path) as temporary:
            temporary.write_bytes(save(arrays))
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
        check_readable(path)
        arrays = load_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read: {error.strerror}. Change its permissions, or use another root."
        ) from error
    except SafetensorError as error:
        return None, f"not a complete safetensors file: {error}"
    problem = mismatch(name, arrays)
    return ({key: arrays[key] for key in CHECKSUMS[name]}, None) if problem is None else (None, problem)


def mismatch(name: str, arrays: dict[str, Tensor]) -> str | None:
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
            said = " ".join(str(error).split())  # torchvision puts each mirror on a line
            raise DatasetError(f"torchvision's download raised {type(error).__name__}: {said}") from error
        images = torch.as_tensor(source.data)
        arrays[f"{split}_images"] = (images if images.ndim == 4 else images.unsqueeze(-1)).contiguous()
        arrays[f"{split}_labels"] = torch.as_tensor(source.targets, dtype=torch.uint8)
    return arrays
