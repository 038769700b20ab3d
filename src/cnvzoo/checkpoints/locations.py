"""Where checkpoints come from and go to: a directory, or an organisation of the Hugging Face Hub.

Whatever a store hands out was compared with the sha256 that its caller knows it by; whatever it takes in arrives whole
or not at all.


Where checkpoints are, and which one is meant: by the path of its folder, its name, or what it has to be."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnvzoo.checkpoints.folder import checkpoint_folders, read_config
from cnvzoo.checkpoints.format import CONFIG, WEIGHTS, CheckpointError, FileFacts, StoreError, checked_name
from cnvzoo.checkpoints.index import read_index
from cnvzoo.checkpoints.retry import RetryPolicy, redacted
from cnvzoo.checkpoints.store import DirectoryStore, Store
from cnvzoo.errors import ModelError, nearest
from cnvzoo.files import expanded
from cnvzoo.models.registry import model_spec

HUB_SCHEME = "hf://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)")  # one letter is a drive
_HUB_LOCATION = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9-]|\.(?!\.)|_){0,95})(?:@([A-Za-z0-9][A-Za-z0-9._-]*))?")


def printed(location: str | Path) -> str:
    """A location as messages have it: an address without its password, a directory as it is."""
    text = str(location)
    is_hub = text.startswith(HUB_SCHEME) and _HUB_LOCATION.fullmatch(text.removeprefix(HUB_SCHEME))
    return redacted(text) if _SCHEME.match(text) and not is_hub else text


def open_store(
    location: str | Path,
    *,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    retry: RetryPolicy | None = None,
) -> Store:
    """Open a store; nothing is asked of it yet.

    Args:
        location: a directory; or `hf://ORG`, the checkpoints of which are the model repositories `ORG/<name>`; or
            `hf://ORG@REVISION` to read them at a tag or commit.
        endpoint: address of the Hub; default HF_ENDPOINT, else https://huggingface.co.
        cache_dir: where downloads are kept; default HF_HUB_CACHE, else the cache of huggingface_hub.
        retry: how long to wait and how often to try again; `RetryPolicy` has the defaults.

    Raises:
        StoreError: the location is neither.
    """
    text = str(location)
    if not _SCHEME.match(text):
        return DirectoryStore(expanded(location))
    match = _HUB_LOCATION.fullmatch(text.removeprefix(HUB_SCHEME))
    if not text.startswith(HUB_SCHEME) or match is None:
        raise StoreError(
            f"{printed(text)!r} is no place for checkpoints: give a directory, hf://ORG or hf://ORG@REVISION"
        )
    from cnvzoo.checkpoints.huggingface import (
        HubStore,  # huggingface_hub takes a while to import, and directories do without
    )

    return HubStore(match[1], match[2], endpoint=endpoint, cache_dir=cache_dir, retry=retry)


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
