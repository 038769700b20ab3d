"""Writing files so that a reader never meets half of one: temporary file beside the target, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Seconds. A process that is writing changes its temporary file far more often; clocks of two machines may differ.
_ABANDONED = 24 * 3600

# it can only be read by changing it, for the whole process: two threads at once could leave it at 0
_asking_for_the_umask = threading.Lock()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path` in one step, on failure it is gone.

    Missing parent folders are made. Temporary files of `path` that nobody has written to for a day are removed: their
    writers were killed. Younger ones may be those of a living process, and stay.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # somebody else's file: it does not keep this one from being written
        remove_leftovers(path, unchanged_for=_ABANDONED)
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


def remove_leftovers(path: str | Path, *, unchanged_for: float = 0.0) -> None:
    """Delete what processes that were killed within `replacing(path)` left behind.

    By default for a path that no other process writes at the time: what it is writing would be deleted too.

    Args:
        path: the file that they were to become.
        unchanged_for: seconds; younger files are left alone.
    """
    path = Path(path)
    for temporary in path.parent.iterdir():
        if is_temporary_of(temporary.name, path.name):
            with suppress(FileNotFoundError):  # its writer was alive, and has just finished
                if time.time() - temporary.lstat().st_mtime >= unchanged_for:
                    temporary.unlink()


def is_temporary_of(name: str, target: str) -> bool:
    """Whether `name` is one that `replacing` gives to a temporary file for the file named `target`."""
    return re.fullmatch(rf"\.{re.escape(target)}\.[^.]+\.tmp", name) is not None


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
