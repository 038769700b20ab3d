"""Writing files so that a reader never meets half of one: temporary file beside the target, fsync, rename.

What the operating system raises on the way is turned into one line for people that names the target.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from cnvzoo.errors import CnvzooError

_OTHER_FOLDER = "choose another folder"
_OTHER_DISK = "free some space there, or choose a folder on another disk"
_REMEDIES = {
    errno.ENOSPC: _OTHER_DISK,
    errno.EDQUOT: _OTHER_DISK,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose a folder on another disk",
    errno.EROFS: f"mount it for writing, or {_OTHER_FOLDER}",
    errno.EACCES: f"allow writing there, or {_OTHER_FOLDER}",
    errno.EPERM: f"allow writing there, or {_OTHER_FOLDER}",
    errno.ENOTDIR: _OTHER_FOLDER,
    errno.EEXIST: _OTHER_FOLDER,  # what mkdir says of a file in the place of the folder
    errno.ENOENT: _OTHER_FOLDER,
    errno.EISDIR: "give the path of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a symbolic link leads to itself: remove it",
    errno.EIO: f"check the disk, or {_OTHER_FOLDER}",
    errno.ESTALE: f"mount it again, or {_OTHER_FOLDER}",
}

# Seconds. A process that is writing changes its temporary file far more often; clocks of two machines may differ.
_ABANDONED = 24 * 3600

# it can only be read by changing it, for the whole process: two threads at once could leave it at 0
_asking_for_the_umask = threading.Lock()


class FileError(CnvzooError, OSError):
    """A path that cannot be written, or is none: the message names it and the remedy.

    Attributes:
        path: the path that was asked for, never that of a temporary file.
        errno, strerror: as of any OSError.
    """

    def __init__(self, path: Path, problem: str, remedy: str, code: int) -> None:
        super().__init__(code, os.strerror(code))
        self.path = path
        self._message = f"{path}: {problem}: {remedy}"

    def __str__(self) -> str:
        return self._message


@contextmanager
def writing(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn what the operating system raises within into a FileError about `path`.

    With `temporary`, only what is about that file, which is written in the place of `path`, or names no file. Errors
    that say nothing about writing pass through.
    """
    try:
        yield
    except FileError:
        raise
    except (OSError, SafetensorError) as error:
        code = _code(error)
        about_another = temporary is not None and getattr(error, "filename", None) not in (None, str(temporary))
        if code not in _REMEDIES or about_another:
            raise
        path = Path(path)
        problem = os.strerror(code)
        if code in (errno.ENOTDIR, errno.EEXIST):
            there = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)
            problem = f"{there} is a file, not a folder" if there else problem
        raise FileError(path, f"cannot be written: {problem}", _REMEDIES[code], code) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path` in one step, on failure it is gone.

    Missing parent folders are made. Temporary files of `path` that nobody has written to for a day are removed: their
    writers were killed. Younger ones may be those of a living process, and stay.

    Raises:
        FileError: `path` cannot be written.
    """
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # somebody else's file: it does not keep this one from being written
            remove_leftovers(path, unchanged_for=_ABANDONED)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(path, temporary):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it is gone, or the file system became read-only, which has been said
            temporary.unlink()


def remove_leftovers(path: str | Path, *, unchanged_for: float = 0.0) -> None:
    """Delete what processes that were killed within `replacing(path)` left behind.

    By default for a path that no other process writes at the time: what it is writing would be deleted too.

    Args:
        path: the file that they were to become.
        unchanged_for: seconds; younger files are left alone.
    """
    path = Path(path)
    with writing(path):
        for temporary in path.parent.iterdir():
            if is_temporary_of(temporary.name, path.name):
                with suppress(FileNotFoundError):  # its writer was alive, and has just finished
                    if time.time() - temporary.lstat().st_mtime >= unchanged_for:
                        temporary.unlink()


def is_temporary_of(name: str, target: str) -> bool:
    """Whether `name` is one that `replacing` gives to a temporary file for the file named `target`."""
    return re.fullmatch(rf"\.{re.escape(target)}\.[^.]+\.tmp", name) is not None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all. Raises FileError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def update_text(path: str | Path, text: str) -> bool:
    """Write `text` (UTF-8) to `path` unless it is there already; returns whether it was written.

    A file that is up to date is only read, so it may be where nothing can be written.
    """
    path = Path(path)
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` or `~user` replaced by the home folder. Raises FileError where there is no such."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileError(
            Path(path), f"{Path(path).parts[0]} is no known home folder", "write the path without ~", errno.ENOENT
        ) from None


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _code(error: OSError | SafetensorError) -> int | None:
    """The errno; safetensors writes files by itself and has it in its message only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _umask() -> int:
    with _asking_for_the_umask:
        mask = os.umask(0)
        os.umask(mask)
    return mask
