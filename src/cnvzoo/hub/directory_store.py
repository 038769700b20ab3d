"""A store that is a folder of checkpoints: on this disk, on a mounted one, or the `hub/` of a checkout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from cnvzoo.errors import nearest
from cnvzoo.files import replacing

from .facts import FileFacts, read_verified
from .publication import (
    FILES,
    Publication,
    StoreError,
    checkpoint_files,
    checkpoint_folders,
    plain_name,
    read_plain_file,
)


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
