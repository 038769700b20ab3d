"""Writing files so that a reader never meets half of one: temporary file beside the target, fsync, rename."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# it can only be read by changing it, for the whole process: two threads at once could leave it at 0
_asking_for_the_umask = threading.Lock()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path` in one step, on failure it is gone.

    Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Delete what processes that were killed within `replacing(path)` left behind.

    For a path that no other process writes at the time: what it is writing would be deleted too.
    """
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    with _asking_for_the_umask:
        mask = os.umask(0)
        os.umask(mask)
    return mask
