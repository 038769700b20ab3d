"""Where checkpoints are: opening a store by its location, and finding a checkpoint by name, path or properties."""

from __future__ import annotations

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
from cnvzoo.models.registry import model_spec, with_defaults

HUB_SCHEME = "hf://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)")  # one letter is a drive
_HUB_LOCATION = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9-]|\.(?!\.)|_){0,95})(?:@([A-Za-z0-9][A-Za-z0-9._-]*))?")


def printable(location: str | Path) -> str:
    """A location for messages: a URL without its password, a directory as it is."""
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
    """Open a store without any request to it.

    Args:
        location: a directory; or `hf://ORG` for the model repositories `ORG/<name>` on the Hugging Face Hub; or
            `hf://ORG@REVISION` to read them at a tag or commit.
        endpoint: URL of the Hub; default HF_ENDPOINT, else https://huggingface.co.
        cache_dir: where downloads are kept; default HF_HUB_CACHE, else the cache of huggingface_hub.
        retry: how long to wait and how often to try again; `RetryPolicy` has the defaults.

    Raises:
        StoreError: the location is none of these, or the endpoint has a password in it.
    """
    if not isinstance(location, (str, Path)) or not (text := str(location)):
        raise StoreError(f"{location!r} is not a store: give a directory, hf://ORG or hf://ORG@REVISION")
    if not _SCHEME.match(text):
        return DirectoryStore(expanded(location))
    match = _HUB_LOCATION.fullmatch(text.removeprefix(HUB_SCHEME))
    if not text.startswith(HUB_SCHEME) or match is None:
        raise StoreError(f"{printable(text)!r} is not a store: give a directory, hf://ORG or hf://ORG@REVISION")
    from cnvzoo.checkpoints.huggingface import HubStore  # huggingface_hub is slow to import

    return HubStore(match[1], match[2], endpoint=endpoint, cache_dir=cache_dir, retry=retry)


ORGANISATION = "hf://cnvzoo"
_SHORT = RetryPolicy(tries=2, first_wait=0.5, deadline=4.0, timeout=3.0)
_CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint's folder on this machine.

    Attributes:
        folder: the folder.
        files: size and sha256 of its files in the index; None for a checkpoint that is not published.
    """

    folder: Path
    files: Mapping[str, FileFacts] | None


def store_location(hub: str | Path | None = None, *, checkout: Path = _CHECKOUT) -> str | Path:
    """Location of the store: `hub`, else `CNVZOO_HUB`, else `hub/` of the checkout, else the Hugging Face Hub."""
    if hub := hub or os.environ.get("CNVZOO_HUB"):
        return hub
    folder = checkout / "hub"
    return folder if folder.is_dir() and (checkout / "pyproject.toml").is_file() else ORGANISATION


def find_checkpoint(
    checkpoint: str | Path, hub: str | Path | None = None, *, every_file: bool = False
) -> LocalCheckpoint:
    """The folder of a checkpoint, fetched from its store where needed.

    Args:
        checkpoint: a name, such as `cnv.mnist`; or the path of a folder, as a Path or as text with a separator.
        hub: the store of named checkpoints, see `store_location`.
        every_file: fetch the model card too, which loading does not need.

    Raises:
        CheckpointError: there is no such checkpoint, or a file is damaged.
    """
    if is_path(checkpoint):
        return LocalCheckpoint(expanded(checkpoint), None)
    name, location = str(checkpoint), store_location(hub)
    published = read_index().checkpoints.get(name)
    if published is not None:
        files = published.files if every_file else {file: published.files[file] for file in (CONFIG, WEIGHTS)}
        return LocalCheckpoint(_fetch(name, location, files), files)
    if folder := _unpublished(location).get(name):
        return LocalCheckpoint(folder, None)
    raise _unknown(name, location)


def check_exists(checkpoint: str | Path, hub: str | Path | None = None) -> None:
    """Raise CheckpointError for a name that is neither published nor in the store, and a path that is no folder."""
    if is_path(checkpoint):
        if not expanded(checkpoint).is_dir():
            raise CheckpointError(f"{checkpoint}: no such folder: give the folder of a checkpoint, or a name")
        return
    name, location = str(checkpoint), store_location(hub)
    if name not in read_index().checkpoints and name not in _unpublished(location):
        raise _unknown(name, location)


def folder_hint(name: str) -> str:
    """The end of a message about an unknown name where a folder here is a checkpoint of it; else empty."""
    if not name or is_path(name) or not os.path.isfile(Path(name) / CONFIG):
        return ""
    return f"there is a folder of that name: write {os.path.join(os.curdir, name)!r}"


def _unknown(name: str, location: str | Path) -> CheckpointError:
    if hint := folder_hint(name):
        return CheckpointError(f"no checkpoint {name!r}, neither published nor in {printable(location)}: {hint}")
    known = sorted({*read_index().checkpoints, *_unpublished(location)})
    if not known:
        return CheckpointError(f"no checkpoint {name!r}: none is published, and none is in {printable(location)}")
    return CheckpointError(
        f"no checkpoint {name!r}, neither published nor in {printable(location)}: {nearest(name, known)}"
    )


def _fetch(name: str, location: str | Path, files: Mapping[str, FileFacts]) -> Path:
    """The folder of a published checkpoint. The default location, which nobody chose, is given up sooner."""
    if location != ORGANISATION:
        return open_store(location).fetch(name, files)
    try:
        return open_store(location, retry=_SHORT).fetch(name, files)
    except StoreError as error:
        problem = str(error)
    raise StoreError(
        f"{name} cannot be fetched from {ORGANISATION}, the default location of checkpoints: connect to the network or "
        "set HF_ENDPOINT to a mirror, give a directory of checkpoints with --hub, hub= or CNVZOO_HUB, or give the path "
        f"of the checkpoint's folder ({problem})"
    )


def choose_checkpoint(
    model: str, wanted: Mapping[str, Any], dataset: str | None = None, hub: str | Path | None = None
) -> str:
    """The name of the only checkpoint of `model` with all arguments `wanted`, trained on `dataset` if that is given.

    A checkpoint whose config cannot be read is left out with a warning.

    Raises:
        ModelError: no such model, no checkpoint fits, or more than one; the message lists the choices.
    """
    model_spec(model)  # refuses an unknown name
    known, unreadable = _known(hub)
    candidates = {name: arguments for name, arguments in known.items() if arguments["name"] == model}
    fitting = [
        name
        for name, arguments in candidates.items()
        if dataset in (None, name.rpartition(".")[2])
        and all(with_defaults(arguments).get(key) == value for key, value in wanted.items())
    ]
    if dataset and len(fitting) > 1:  # the full name of a published one; others have names of their own
        fitting = [name for name in fitting if name in read_index().checkpoints] or fitting
    left_out = "; ".join(f"{name} is left out: {error}" for name, error in unreadable.items())
    if len(fitting) == 1:
        if left_out:
            warnings.warn(left_out, stacklevel=3)  # the caller of create_model
        return fitting[0]
    asked = ", ".join([model, *(f"{key}={value}" for key, value in wanted.items()), *([dataset] if dataset else [])])
    if fitting:
        raise ModelError(f"more than one checkpoint of {asked}: give one of the names {', '.join(fitting)}")
    besides = f"; {left_out}" if left_out else ""
    if not candidates:
        raise ModelError(f"no checkpoint of {model} is published: pretrained=False builds it without weights{besides}")
    raise ModelError(
        f"no checkpoint of {asked}: give one of the names {', '.join(candidates)}; num_classes and in_chans may then "
        f"differ from its own{besides}"
    )


def own_checkpoint(name: str, hub: str | Path | None = None) -> Path | None:
    """The folder of a checkpoint that is in the store's directory under a name that is not published, else None."""
    return _unpublished(store_location(hub)).get(name)


def is_path(checkpoint: str | Path) -> bool:
    """Whether this is a path, not a name: a Path, or text with a separator.

    Raises:
        ModelError: it is neither text nor a Path.
    """
    if not isinstance(checkpoint, (str, Path)):
        raise ModelError(f"{checkpoint!r}: the name of a model or checkpoint is text, and its path text or a Path")
    return isinstance(checkpoint, Path) or any(s in checkpoint for s in (os.sep, os.altsep) if s)


def _known(hub: str | Path | None) -> tuple[dict[str, dict[str, Any]], dict[str, CheckpointError]]:
    """Model arguments of every checkpoint by name; and the errors of those that cannot be read."""
    known = {name: published.model for name, published in read_index().checkpoints.items()}
    unreadable = {}
    for name, folder in _unpublished(store_location(hub)).items():
        try:
            known[name] = read_config(folder).model
        except CheckpointError as error:
            unreadable[name] = error
    return dict(sorted(known.items())), unreadable


def _unpublished(location: str | Path) -> dict[str, Path]:
    """The checkpoints in a directory that are not in the index."""
    if "://" in str(location):
        return {}
    published = read_index().checkpoints
    folders = checkpoint_folders(expanded(location))
    return {name: folder for name, folder in folders.items() if name not in published and _is_valid(name)}


def _is_valid(name: str) -> bool:
    try:
        return bool(checked_name(name))
    except ValueError:
        return False
