"""What goes through a store: the files of one checkpoint, under names that lead nowhere else, and what became of them.

A name that reaches a store may come from a command line, an index or a server. Only plain names are let through, so
that nothing can be read or written outside of the folder that is meant.

Which folders of a directory are checkpoints, and which files of a folder are a checkpoint's, is decided here alone:
publishing, the index and the search by name have to agree on it.


Where checkpoints come from and go to: a directory, or an organisation of the Hugging Face Hub.

Whatever a store hands out was compared with the sha256 that its caller knows it by; whatever it takes in arrives whole
or not at all.


A store that is a folder of checkpoints: on this disk, on a mounted one, or the `hub/` of a checkout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from cnvzoo.checkpoints.folder import (
    FILES,
    checkpoint_files,
    checkpoint_folders,
    plain_name,
    read_plain_file,
    read_verified,
)
from cnvzoo.checkpoints.format import FileFacts, StoreError
from cnvzoo.errors import nearest
from cnvzoo.files import replacing


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


class DirectoryStore:
    """Checkpoints in the folders of `root`, each under its name. See `cnvzoo.hub.Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def location(self) -> str:
        return str(self.root)

    def fetch(self, name: str, files: Mapping[str, FileFacts]) -> Path:
        folder = self.root / plain_name(name, "checkpoint")
        if folder.is_symlink():
            raise StoreError(
                f"{folder}: a symbolic link, which could lead out of the store; put the folder itself there"
            )
        if not folder.is_dir():
            known = checkpoint_folders(self.root)
            choices = nearest(name, known) if known else "it has no checkpoints at all"
            raise StoreError(f"no checkpoint {name!r} in {self.root}: {choices}")
        for file, facts in files.items():
            path = folder / plain_name(file, f"a file of {name}")
            if path.is_symlink():
                raise StoreError(
                    f"{path}: a symbolic link, which could lead out of the store; put the file itself there"
                )
            read_verified(path, facts)
        return folder

    def publish(
        self, folder: str | Path, *, message: str, tag: str | None = None, dry_run: bool = False
    ) -> Publication:
        folder = Path(folder)
        if tag is not None:
            raise StoreError(
                f"{self.root} is a directory and has no tags: leave tag {tag!r} out, or publish to hf://ORG"
            )
        files = checkpoint_files(folder)
        name = folder.resolve().name
        if dry_run:
            return self._compare(name, files, dry_run=True)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # The files of two publishers must not mix: one writes, the other waits and then compares again.
            with FileLock(self.root / f".{name}.lock"):
                publication = self._compare(name, files)
                for file in publication.to_write:
                    with replacing(self.root / name / file) as temporary:
                        temporary.write_bytes(files[file])
        except OSError as error:
            raise StoreError(
                f"{name} cannot be written to {self.root}: {error.strerror}; the same command goes on from here"
            ) from error
        return publication

    def _compare(self, name: str, files: Mapping[str, bytes], *, dry_run: bool = False) -> Publication:
        target = self.root / name
        if target.is_symlink():
            raise StoreError(f"{target}: a symbolic link, which could lead out of the store; remove it, then publish")
        present = [file for file in FILES if (target / file).exists() or (target / file).is_symlink()]
        same = [file for file in present if read_plain_file(target / file) == files[file]]
        return Publication(
            name=name,
            location=self.location,
            new=tuple(file for file in FILES if file not in present),
            changed=tuple(file for file in present if file not in same),
            unchanged=tuple(same),
            dry_run=dry_run,
        )
