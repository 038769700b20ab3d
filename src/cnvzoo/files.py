"""Writing files atomically: to a temporary file beside the target, then fsync and rename.

A reader sees the old file or the new one, never a part. Errors of the operating system are raised as FileError, whose
message names the target and the remedy.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
    errno.EEXIST: _OTHER_FOLDER,  # from mkdir, if a file has the name of the folder
    errno.ENOENT: _OTHER_FOLDER,
    errno.EISDIR: "give the path of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENXIO: "nothing reads from it: give the path of a file",
    errno.ELOOP: "a symbolic link leads to itself: remove it",
    errno.EIO: f"check the disk, or {_OTHER_FOLDER}",
    errno.ESTALE: f"mount it again, or {_OTHER_FOLDER}",
}

# Seconds since the last change after which a temporary file is taken for abandoned; a writer changes its file far more
# often, but clocks of two machines may differ.
_ABANDONED = 24 * 3600

# The umask can only be read by changing it, for the whole process: two threads at once could leave it at 0.
_umask_lock = threading.Lock()


class FileError(CnvzooError, OSError):
    """A path that is invalid or cannot be written; the message names the path and the remedy.

    Attributes:
        path: the target, never a temporary file.
        errno, strerror: as for any OSError.
    """

    def __init__(self, path: Path, problem: str, remedy: str, code: int) -> None:
        super().__init__(code, os.strerror(code))
        self.path, self._problem, self._remedy = path, problem, remedy
        self._message = f"{path}: {problem}: {remedy}"

    def __str__(self) -> str:
        return self._message

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes send this error to the process that started them."""
        return FileError, (self.path, self._problem, self._remedy, self.errno)


@contextmanager
def writing(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """A context that raises errors of the operating system about writing as a FileError about `path`.

    Other errors pass through. If `temporary`, which is written in place of `path`, is given, so do errors that name
    any other file.
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
            there = file_in_the_way(path)
            problem = f"{there} is a file, not a folder" if there else problem
        raise FileError(path, f"cannot be written: {problem}", _REMEDIES[code], code) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A context that gives a temporary path to write: renamed to `path` on success, deleted on failure.

    Missing parent folders are made. Temporary files of `path` that were not changed for a day are deleted, since their
    writers were killed; younger ones may belong to a running process.

    A file that is replaced keeps its permissions. A symbolic link stays: the file that it leads to is replaced. A
    device or a pipe stays too: the bytes are written into it.

    Raises:
        FileError: `path` cannot be written.
    """
    path = Path(path)
    if _is_special(path):
        with _copied_into(path) as temporary:
            yield temporary
        return
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path = _target(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a file that this user may not delete does not matter
            remove_leftovers(path, unchanged_for=_ABANDONED)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(path, temporary):
            yield temporary
            with temporary.open("r+b") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())
            temporary.chmod(_mode(path))
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # renamed already, or the file system became read-only, which was raised
            temporary.unlink()


@contextmanager
def _copied_into(path: Path) -> Iterator[Path]:
    """A context that gives a temporary path to write, whose content is then written into a device or pipe."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "content"
        temporary.touch()
        yield temporary
        with writing(path), temporary.open("rb") as source, open(os.open(path, os.O_WRONLY), "wb") as sink:
            shutil.copyfileobj(source, sink)


def _is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder, such as a device or a pipe."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _target(path: Path) -> Path:
    """Where a symbolic link leads, through others if it is to another link; any other path as it is."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # the links lead in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def remove_leftovers(path: str | Path, *, unchanged_for: float = 0.0) -> None:
    """Delete the temporary files of processes that were killed inside `replacing(path)`.

    With the default of `unchanged_for`, no other process may be writing `path`: its temporary file is deleted too.

    Args:
        path: the target of the temporary files.
        unchanged_for: only delete files that were not changed for this many seconds.
    """
    path = Path(path)
    with writing(path):
        for temporary in path.parent.iterdir():
            if is_temporary_of(temporary.name, path.name):
                with suppress(FileNotFoundError):  # its writer has just finished
                    if time.time() - temporary.lstat().st_mtime >= unchanged_for:
                        temporary.unlink()


def is_temporary_of(name: str, target: str) -> bool:
    """Whether `name` is the name of a temporary file of `replacing` for a target named `target`."""
    return re.fullmatch(rf"\.{re.escape(target)}\.[^.]+\.tmp", name) is not None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically. Raises FileError if it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())  # the same bytes on all systems


def update_text(path: str | Path, text: str) -> bool:
    """Write `text` (UTF-8) to `path` unless that is its content; returns whether it was written.

    A file that is up to date is only read, so it may be read-only.
    """
    path = Path(path)
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` or `~user` replaced by the home folder. Raises FileError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileError(
            Path(path), f"{Path(path).parts[0]} is not a known home folder", "write the path without ~", errno.ENOENT
        ) from None


def file_in_the_way(folder: Path) -> Path | None:
    """The file that has the path of a folder or of one of its parents, so that the folder cannot be made; else None."""
    return next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None)


def check_readable(path: str | Path) -> None:
    """Raise the OSError that opening a file raises; safetensors says of every one that there is no such file."""
    with Path(path).open("rb"):
        pass


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _code(error: OSError | SafetensorError) -> int | None:
    """The errno; safetensors has it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced; of a new one, those that the umask leaves."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return 0o666 & ~_umask()


def _umask() -> int:
    with _umask_lock:
        mask = os.umask(0)
        os.umask(mask)
    return mask
