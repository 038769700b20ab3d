"""Where checkpoints are, and which one is meant: by the path of its folder, its name, or what it has to be."""

from __future__ import annotations

import fnmatch
import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnvzoo.errors import ModelError, nearest
from cnvzoo.files import expanded
from cnvzoo.models import model_spec

from .checkpoint import read_config
from .errors import CheckpointError
from .facts import FileFacts
from .index import CONFIG, WEIGHTS, CheckpointInfo, checked_name, read_index, row
from .publication import checkpoint_folders
from .store import open_store, printed

ORGANISATION = "hf://cnvzoo"
_CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder on this machine, and what its files are known to be; None: they speak for themselves."""

    folder: Path
    files: Mapping[str, FileFacts] | None


def hub_location(hub: str | Path | None = None) -> str | Path:
    """Where checkpoints are looked for: `hub`, else `CNVZOO_HUB`, else the checkout's own `hub/`, else the HF Hub."""
    if hub := hub or os.environ.get("CNVZOO_HUB"):
        return hub
    own = _CHECKOUT / "hub"
    return own if own.is_dir() and (_CHECKOUT / "pyproject.toml").is_file() else ORGANISATION


def list_checkpoints(pattern: str = "*") -> list[CheckpointInfo]:
    """The published checkpoints, those whose names match a shell pattern such as `*.cifar10`, sorted by name.

    Each is a dict of name, model, dataset, w_bits and a_bits (None for float), accuracy in percent (and the `correct`
    images of `total` behind it), parameters, macs for one image, and bytes of the weights file.
    """
    entries = sorted(read_index().checkpoints.items())
    return [row(name, entry) for name, entry in entries if fnmatch.fnmatchcase(name, pattern)]


def find_checkpoint(checkpoint: str | Path, hub: str | Path | None = None, *, every_file: bool = False) -> Located:
    """The folder of a checkpoint, with its files here and those of the index compared with it.

    Args:
        checkpoint: a name, such as `cnv.mnist`; or the path of a folder, as a Path or with a separator in it, which
            need not be a published one.
        hub: where names are looked for, see `hub_location`.
        every_file: have the files here that loading does without.

    Raises:
        CheckpointError: there is no such checkpoint, or a file is damaged.
    """
    if is_path(checkpoint):
        return Located(expanded(checkpoint), None)
    name, location = str(checkpoint), hub_location(hub)
    entry = read_index().checkpoints.get(name)
    if entry is not None:
        files = entry.files if every_file else {file: entry.files[file] for file in (CONFIG, WEIGHTS)}
        return Located(open_store(location).fetch(name, files), files)
    if folder := _own_folders(location).get(name):
        return Located(folder, None)
    known = sorted({*read_index().checkpoints, *_own_folders(location)})
    if not known:
        raise CheckpointError(f"no checkpoint {name!r}: none is published, and none is in {printed(location)}")
    raise CheckpointError(
        f"no checkpoint {name!r}, neither published nor in {printed(location)}: {nearest(name, known)}"
    )


def choose_checkpoint(
    model: str, wanted: Mapping[str, Any], dataset: str | None = None, hub: str | Path | None = None
) -> str:
    """The name of the one checkpoint of `model` that was built with all arguments `wanted`, on `dataset` if given.

    A checkpoint whose config cannot be read is not chosen, and keeps no other from it; a warning names it.

    Raises:
        ModelError: none fits, or more than one; with those that there are, and those that cannot be read.
    """
    defaults = {name: option.default for name, option in inspect.signature(model_spec(model).build).parameters.items()}
    known, unreadable = _known(hub)
    candidates = {name: arguments for name, arguments in known.items() if arguments["name"] == model}
    fitting = [
        name
        for name, arguments in candidates.items()
        if dataset in (None, name.rpartition(".")[2])
        and all((defaults | arguments).get(key) == value for key, value in wanted.items())
    ]
    left_out = "; ".join(f"{name} is left out: {error}" for name, error in unreadable.items())
    if len(fitting) == 1:
        if left_out:
            warnings.warn(left_out, stacklevel=3)  # of the caller of create_model
        return fitting[0]
    asked = ", ".join([model, *(f"{key}={value}" for key, value in wanted.items()), *([dataset] if dataset else [])])
    if fitting:
        raise ModelError(f"more than one checkpoint is of {asked}: say which, by its name: {', '.join(fitting)}")
    besides = f"; {left_out}" if left_out else ""
    if not candidates:
        raise ModelError(f"no checkpoint of {model} is published: pretrained=False builds it without weights{besides}")
    raise ModelError(
        f"no checkpoint is of {asked}: name one for its weights, whatever num_classes and in_chans: "
        f"{', '.join(candidates)}{besides}"
    )


def is_path(checkpoint: str | Path) -> bool:
    """Whether a folder is meant, not a name: a Path, or text with a separator."""
    return isinstance(checkpoint, Path) or any(s in checkpoint for s in (os.sep, os.altsep) if s)


def _known(hub: str | Path | None) -> tuple[dict[str, dict[str, Any]], dict[str, CheckpointError]]:
    """The arguments of `create_model` for each checkpoint that can be named, sorted by name; and what is unreadable."""
    known = {name: entry.model for name, entry in read_index().checkpoints.items()}
    unreadable = {}
    for name, folder in _own_folders(hub_location(hub)).items():
        try:
            known[name] = read_config(folder).model
        except CheckpointError as error:
            unreadable[name] = error
    return dict(sorted(known.items())), unreadable


def _own_folders(location: str | Path) -> dict[str, Path]:
    """Checkpoints in a directory that are not published ones."""
    if "://" in str(location):
        return {}
    published = read_index().checkpoints
    folders = checkpoint_folders(expanded(location))
    return {name: folder for name, folder in folders.items() if name not in published and _is_named(name)}


def _is_named(name: str) -> bool:
    try:
        return bool(checked_name(name))
    except ValueError:
        return False
