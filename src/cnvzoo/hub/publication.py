"""What goes through a store: the files of one checkpoint, under names that lead nowhere else, and what became of them.

A name that reaches a store may come from a command line, an index or a server. Only plain names are let through, so
that nothing can be read or written outside of the folder that is meant.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CONFIG, WEIGHTS, CheckpointError, read_config
from .index import FileFacts

CARD = "README.md"
FILES = (WEIGHTS, CARD, CONFIG)  # in the order in which they are written: without its config a folder is no checkpoint
_PLAIN_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,94}")


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
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise StoreError(
            f"{kind} {name!r} is not a plain name (letters, digits, '_', '-' and single dots, at most 95, no folders): "
            "it is refused, because it could lead out of the checkpoint's folder"
        )
    return name


def read_plain_file(path: Path) -> bytes:
    """The bytes of a regular file that is no symbolic link. Raises StoreError."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            what = "a symbolic link, which could lead out of the folder" if stat.S_ISLNK(mode) else "not a file"
            raise StoreError(f"{path}: {what}; a checkpoint is made of plain files: put one in its place")
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def mismatch(content: bytes, facts: FileFacts) -> str | None:
    """What tells `content` apart from the file that `facts` are of, or None if it is that file."""
    if len(content) != facts.size:
        return f"{len(content):,} bytes, and {facts.size:,} were expected"
    found = hashlib.sha256(content).hexdigest()
    if found != facts.sha256:
        return f"sha256 is {found[:16]}..., and {facts.sha256[:16]}... was expected"
    return None


def files_to_publish(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint that is fit to be published, by name.

    Raises:
        StoreError: a file is missing, or there is one that is no part of a checkpoint.
        CheckpointError: the config is not valid, or the weights are not those that it names.
    """
    name = plain_name(folder.resolve().name, "checkpoint")
    if folder.is_symlink() or not folder.is_dir():
        raise StoreError(f"{folder}: not a folder, and a checkpoint is one")
    present = {path.name for path in folder.iterdir()}
    if missing := [file for file in FILES if file not in present]:
        remedy = f"; write the card with cnvzoo.write_card({str(folder)!r})" if missing == [CARD] else ""
        raise StoreError(f"{folder}: {', '.join(missing)} missing; published are {', '.join(FILES)}{remedy}")
    if extra := sorted(present.difference(FILES)):
        raise StoreError(f"{folder}: {', '.join(extra)} is no part of a checkpoint: move it elsewhere, then publish")
    files = {file: read_plain_file(folder / file) for file in FILES}
    config = read_config(folder)
    if config.name != name:
        raise StoreError(f"{folder / CONFIG}: of {config.name!r}, and its folder is {name!r}: rename one of the two")
    if (found := hashlib.sha256(files[WEIGHTS]).hexdigest()) != config.weights_sha256:
        raise StoreError(
            f"{folder / WEIGHTS}: sha256 is {found[:16]}..., and the config has {config.weights_sha256[:16]}...: "
            "the file is damaged or another; nothing was published"
        )
    return files


def facts_of(files: Mapping[str, bytes]) -> dict[str, FileFacts]:
    """sha256 and size of each file."""
    return {name: FileFacts(hashlib.sha256(content).hexdigest(), len(content)) for name, content in files.items()}
