"""The dataset cache: one verified safetensors file per dataset, filled from torchvision's downloaders.

Every number of the tables rests on these pixels being the published ones in their published order, so the sha256 of
each array is checked on every load, whatever wrote the file; it costs about 0.2 s for the largest set.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cnvzoo.errors import CnvzooError
from cnvzoo.files import expanded

# Array name -> {"shape", "dtype", "sha256"} for each dataset.
CHECKSUMS: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("checksums.json").read_text(encoding="utf-8")
)

_TORCHVISION_CLASSES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


class DatasetError(CnvzooError, ValueError):
    """A dataset that is unknown, cannot be had, or is not what it should be."""


def default_root() -> Path:
    """`$CNVZOO_DATA`, else `~/.cache/cnvzoo/datasets`."""
    configured = os.environ.get("CNVZOO_DATA")
    return expanded(configured or "~/.cache/cnvzoo/datasets")


def load_arrays(name: str, root: Path) -> dict[str, Tensor]:
    """The four verified arrays of `name`, fetched into `root` first if they are not there.

    A cached file that fails its check is set aside as `<file>.corrupt` and fetched again.

    Raises:
        DatasetError: nothing verified is in the cache and the fetch failed; the message says what was wrong with a
            refused file and what to do.
    """
    path = root / f"{name}.safetensors"
    arrays, _ = _read(name, path)
    if arrays is not None:
        return arrays
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One process fetches; the others wait here and then read what it has written.
        with FileLock(root / f".{name}.lock"):
            return _replace(name, path)
    except OSError as error:
        raise DatasetError(
            f"{name} cannot be written to the dataset cache {root}: {error}. {_remedy(name, path)}"
        ) from error


def _replace(name: str, path: Path) -> dict[str, Tensor]:
    arrays, problem = _read(name, path)
    if arrays is not None:
        return arrays
    history = f"{path} is not in the dataset cache"
    if problem is not None:
        aside = path.with_name(f"{path.name}.corrupt")
        os.replace(path, aside)
        history = f"the cached {path} was refused ({problem}) and set aside as {aside.name}"
        warnings.warn(f"{name}: {history}; fetching it again.", stacklevel=4)
    scratch = path.with_name(f".{name}.fetch")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed: the lock is ours
    scratch.mkdir()
    try:
        arrays = _fetch(name, scratch)
        problem = _mismatch(name, arrays)
        if problem is not None:
            raise DatasetError(f"torchvision delivered other data than the published set: {problem}")
        _write(arrays, scratch / path.name, path)
    except DatasetError as error:
        raise DatasetError(f"{name}: {history}, and fetching it failed: {error}. {_remedy(name, path)}") from error
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
        raise DatasetError(f"{path} may not be read: {error}. Change its permissions, or use another root.") from error
    except (OSError, SafetensorError) as error:
        return None, f"not a complete safetensors file: {error}"
    problem = _mismatch(name, arrays)
    return ({key: arrays[key] for key in CHECKSUMS[name]}, None) if problem is None else (None, problem)


def _mismatch(name: str, arrays: dict[str, Tensor]) -> str | None:
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


def _fetch(name: str, scratch: Path) -> dict[str, Tensor]:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DatasetError(f"torchvision, which downloads it, does not import ({error})") from error
    arrays: dict[str, Tensor] = {}
    for split in ("train", "test"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy's words about the pickles of CIFAR
                source = getattr(datasets, _TORCHVISION_CLASSES[name])(
                    str(scratch / "download"), train=split == "train", download=True
                )
        except Exception as error:  # a dozen kinds, from DNS to a mirror's error page: one remedy
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
