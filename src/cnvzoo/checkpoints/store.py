"""A store: a place that holds checkpoints by name. Here the interface, and the store that is a directory.

What a store returns was compared with the sha256 that the caller expects. The Hub takes the files of a checkpoint in
one commit, so all or none of them. A directory takes them one by one, each whole: where one cannot be written, those
before it stay, and the same publication completes it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from cnvzoo.errors import in_a_line, nearest
from cnvzoo.files import replacing


@dataclass(frozen=True)
class Publication:
    """What publishing one checkpoint did, or would do.

    Attributes:
        name: name of the checkpoint.
        location: location of the store, such as `hf://cnvzoo` or a folder.
        new, changed, unchanged: names of files, compared with what the store had.
        commit: id of the new commit on the Hub; None where nothing was written, and for directories.
        tag: the tag at these files, where one was asked for.
        dry_run: whether this is what would be done; nothing was written.
    """

    name: str
    location: str
    new: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    commit: str | None = None
    tag: str | None = None
    dry_run: bool = False

    @classmethod
    def of_comparison(
        cls, name: str, location: str, present: Sequence[str], same: Sequence[str], *, tag: str | None = None
    ) -> Publication:
        """What there is to publish where the store has the files `present`, and of these `same` as they are here."""
        return cls(
            name=name,
            location=location,
            new=tuple(file for file in FILES if file not in present),
            changed=tuple(file for file in present if file not in same),
            unchanged=tuple(same),
            tag=tag,
        )

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
        location: the place as `open_store` takes it: a directory or `hf://ORG`.
    """

    @property
    def location(self) -> str: ...

    def fetch(self, name: str, files: Mapping[str, FileFacts]) -> Path:
        """A local folder with each of `files`, after comparison of size and sha256.

        Raises:
            CheckpointError: there is no such checkpoint or file, its content is another, a name or a symbolic link
                leads out of the folder, or the Hub cannot be read.
        """
        ...

    def publish(
        self, folder: str | Path, *, message: str, tag: str | None = None, dry_run: bool = False
    ) -> Publication:
        """Publish the checkpoint in `folder` under the folder's name.

        Only files that changed are written. Other files in the store are left alone.

        Args:
            folder: weights, config and model card, and nothing else.
            message: commit message, where the store has commits.
            tag: tag to set at these files, where the store has tags. An existing tag is never moved.
            dry_run: compare, and write nothing.

        Raises:
            StoreError: the folder is not fit to be published, or the store does not take it.
        """
        ...


class DirectoryStore:
    """The checkpoints in the folders of `root`: on this disk, on a mounted one, or the `hub/` of a checkout."""

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
        if not self.root.is_dir():
            raise StoreError(
                f"{self.root}: no such folder: give a directory of checkpoints with --hub, hub= or CNVZOO_HUB"
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
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{self.root}: a file, not a folder: give a directory to publish to")
        files = checkpoint_files(folder)
        name = folder.resolve().name
        if dry_run:
            return replace(self._compare(name, files), dry_run=True)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # The files of two publishers must not mix: one writes, the other waits and then compares again.
            with FileLock(self.root / f".{name}.lock"):
                publication = self._compare(name, files)
                for file in publication.to_write:
                    with replacing(self.root / name / file) as temporary:
                        temporary.write_bytes(files[file])
        except OSError as error:
            resumes = "; the same command resumes here" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise StoreError(f"{name}: {in_a_line(error)}{resumes}") from error
        return publication

    def _compare(self, name: str, files: Mapping[str, bytes]) -> Publication:
        target = self.root / name
        if target.is_symlink():
            raise StoreError(f"{target}: a symbolic link, which could lead out of the store; remove it, then publish")
        present = [file for file in FILES if (target / file).exists() or (target / file).is_symlink()]
        same = [file for file in present if read_plain_file(target / file) == files[file]]
        return Publication.of_comparison(name, self.location, present, same)
