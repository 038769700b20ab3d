"""Where checkpoints come from and go to: a directory, or an organisation of the Hugging Face Hub.

Whatever a store hands out was compared with the sha256 that its caller knows it by; whatever it takes in arrives whole
or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cnvzoo.files import expanded

from .attempts import Patience
from .directory_store import DirectoryStore
from .facts import FileFacts
from .publication import Publication, StoreError
from .redaction import redacted

HUB_SCHEME = "hf://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)")  # one letter is a drive
_HUB_LOCATION = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9-]|\.(?!\.)|_){0,95})(?:@([A-Za-z0-9][A-Za-z0-9._-]*))?")


class Store(Protocol):
    """A place that holds checkpoints by name.

    Attributes:
        location: as it was given to `open_store`.
    """

    @property
    def location(self) -> str: ...

    def fetch(self, name: str, files: Mapping[str, FileFacts]) -> Path:
        """A local folder in which each of `files` is present and has been compared, size first, then sha256.

        Raises:
            StoreError: there is no such checkpoint or file, it is not the one that `files` describe, a name or a
                symbolic link leads out of the folder, or the Hub does not give it.
        """
        ...

    def publish(
        self, folder: str | Path, *, message: str, tag: str | None = None, dry_run: bool = False
    ) -> Publication:
        """Put the checkpoint in `folder` into the store, under the folder's name.

        Nothing is written where nothing changed. What the store has besides a checkpoint's files is left alone.

        Args:
            folder: with the weights, the config and the model card, and nothing else.
            message: of the commit, where the store has commits.
            tag: to set at these files, where the store has tags. A tag that exists is never moved.
            dry_run: compare, and write nothing.

        Raises:
            StoreError: the folder is not fit to be published, or the store does not take it.
        """
        ...


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
    patience: Patience | None = None,
) -> Store:
    """Open a store; nothing is asked of it yet.

    Args:
        location: a directory; or `hf://ORG`, the checkpoints of which are the model repositories `ORG/<name>`; or
            `hf://ORG@REVISION` to read them at a tag or commit.
        endpoint: address of the Hub; default HF_ENDPOINT, else https://huggingface.co.
        cache_dir: where downloads are kept; default HF_HUB_CACHE, else the cache of huggingface_hub.
        patience: how long to wait and how often to try again.

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
    from .hub_store import HubStore  # huggingface_hub takes a while to import, and directories do without

    return HubStore(match[1], match[2], endpoint=endpoint, cache_dir=cache_dir, patience=patience or Patience())
