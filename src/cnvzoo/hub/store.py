"""Where checkpoints come from: a directory that has them by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from .errors import CheckpointError
from .facts import FileFacts, read_verified
from .index import checked_name


class StoreError(CheckpointError):
    """A store that cannot be read, or does not have what was asked for."""


class Store(Protocol):
    """A place with checkpoints."""

    def fetch(self, name: str, files: Mapping[str, FileFacts]) -> Path:
        """A local folder in which each of `files` is present and verified. Raises CheckpointError."""
        ...


class DirectoryStore:
    """Checkpoints as folders of a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fetch(self, name: str, files: Mapping[str, FileFacts]) -> Path:
        try:
            folder = self.root / checked_name(name)
            for file, facts in files.items():
                read_verified(folder / checked_name(file), facts)
        except ValueError as error:
            raise StoreError(f"{self.root}: {error}") from None
        return folder


def open_store(location: str | Path) -> Store:
    """The store at `location`. Raises StoreError for one that cannot be opened."""
    if "://" in str(location):
        raise StoreError(f"{location}: not a directory")
    return DirectoryStore(Path(location).expanduser())
