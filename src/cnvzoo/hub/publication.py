"""What goes through a store: the files of one checkpoint, under names that lead nowhere else, and what became of them.

A name that reaches a store may come from a command line, an index or a server. Only plain names are let through, so
that nothing can be read or written outside of the folder that is meant.

Which folders of a directory are checkpoints, and which files of a folder are a checkpoint's, is decided here alone:
publishing, the index and the search by name have to agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnvzoo.files import is_temporary_of

from .checkpoint import read_config
from .errors import CheckpointError
from .facts import LARGEST_FILE, FileFacts, read_limited
from .index import CARD, CONFIG, WEIGHTS, checked_name

FILES = (WEIGHTS, CARD, CONFIG)  # in the order in which they are written: without its config a folder is no checkpoint


class StoreError(CheckpointError):
    """A checkpoint that a store does not give, or does not take: what was asked, what came back, what to do."""


@dataclass(frozen=True)
class Publication:
    """What publishing one checkpoint did, or would do.

    Attributes:
        name: of the checkpoint.
        location: of the store, such as `hf://cnvzoo`, or a folder.
        new, changed, unchanged: names of files, compared with what the store had.
        commit: that the Hub made of it; None where nothing was written, and in directories, which have no commits.
        tag: that stands at these files, if one was asked for.
        dry_run: nothing was written.
    """

    name: str
    location: str
    new: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    commit: str | None = None
    tag: str | None = None
    dry_run: bool = False

    @property
    def to_write(self) -> tuple[str, ...]:
        """The files that are not in the store as they are here."""
        return tuple(name for name in FILES if name in self.new + self.changed)

    def __str__(self) -> str:
        groups = [("new", self.new), ("changed", self.changed)]
        files = "; ".join(f"{what} {', '.join(names)}" for what, names in groups if names)
        if not files:
            done = "nothing to publish" if self.dry_run else "unchanged"
        else:
            done = f"would publish {files}" if self.dry_run else f"published {files}"
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        tag = f", {'would tag' if self.dry_run else 'tag'} {self.tag}" if self.tag else ""
        return f"{self.name} to {self.location}: {done}{commit}{tag}"


def plain_name(name: str, kind: str) -> str:
    """Return `name` if it is one plain name. Raises StoreError for anything that could lead out of a folder."""
    try:
        return checked_name(name)
    except ValueError as error:
        raise StoreError(f"{kind}: {error}; it is refused, because it could lead out of the folder") from None


def read_plain_file(path: Path) -> bytes:
    """The bytes of a regular file that is no symbolic link. Raises CheckpointError."""
    if path.is_symlink():
        raise StoreError(f"{path}: a symbolic link, which could lead out of the folder; put the file itself there")
    return read_limited(path, LARGEST_FILE, f"more than {LARGEST_FILE:,} bytes: no part of a checkpoint")


def checkpoint_folders(root: Path) -> dict[str, Path]:
    """The folders in `root` that hold a checkpoint, valid or not, by name in alphabetical order.

    These are the folders with a config; hidden ones are none.
    """
    folders = sorted(config.parent for config in root.glob(f"*/{CONFIG}"))
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}


def checkpoint_files(folder: Path, *, needed: Sequence[str] = FILES) -> dict[str, bytes]:
    """The files of a whole checkpoint by name, compared with its config.

    The temporary file of a process that writes one of them, or was killed while it did, is passed over.

    Args:
        folder: of the checkpoint.
        needed: the files that have to be there: all that are published, or those that loading takes.

    Raises:
        StoreError: a file is missing, there is one that is no part of a checkpoint, the folder has another name than
            the checkpoint, or the weights are not those that the config describes.
        CheckpointError: the config is not valid.
    """
    name = plain_name(folder.resolve().name, "checkpoint")
    if folder.is_symlink() or not folder.is_dir():
        raise StoreError(f"{folder}: not a folder, and a checkpoint is one")
    present = {
        path.name for path in folder.iterdir() if not any(is_temporary_of(path.name, file) for file in FILES)
    }  # fmt: skip
    if missing := [file for file in needed if file not in present]:
        remedy = f"; write the card with cnvzoo.write_card({str(folder)!r})" if missing == [CARD] else ""
        raise StoreError(f"{folder}: {', '.join(missing)} missing; published are {', '.join(FILES)}{remedy}")
    if extra := sorted(present.difference(FILES)):
        raise StoreError(f"{folder}: {', '.join(extra)} is no part of a checkpoint: move it elsewhere")
    files = {file: read_plain_file(folder / file) for file in FILES if file in present}
    config = read_config(folder, FileFacts.of(files[CONFIG]))
    if config.name != name:
        raise StoreError(f"{folder / CONFIG}: of {config.name!r}, and its folder is {name!r}: rename one of the two")
    if FileFacts.of(files[WEIGHTS]) != config.file:
        raise StoreError(f"{folder / WEIGHTS}: not the file that its config describes, so damaged, or another")
    return files
