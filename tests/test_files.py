"""Files are written atomically, and errors name the target."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import pickle
import re
import stat
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cnvzoo.errors import CnvzooError
from cnvzoo.files import FileError, expanded, remove_leftovers, replacing, sha256_of, update_text, write_text


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new, half")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent  # a rename across file systems would not be one step
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_only_the_old_file(tmp_path: Path, old: bytes | None, error: type[BaseException]) -> None:
    path = tmp_path / "weights.bin"
    if old is not None:
        path.write_bytes(old)

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == ([path] if old else [])
    assert not old or path.read_bytes() == old


def test_only_temporary_files_of_the_path_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "state[1].bin"
    path.touch()
    names = (".state[1].bin", "state[1].bin.tmp", ".state1.bin.x.tmp", ".state[1].bin.old.x.tmp", ".lock")
    others = [tmp_path / name for name in names]
    for other in others:
        other.touch()
    for _ in range(2):
        with replacing(path) as temporary:
            kept = temporary.read_bytes()
        temporary.write_bytes(kept)  # as if the process had been killed inside
    remove_leftovers(path)
    assert set(tmp_path.iterdir()) == {path, *others}


def test_the_next_writer_removes_temporary_files_that_are_a_day_old(tmp_path: Path) -> None:
    path, day = tmp_path / "weights.bin", 24 * 3600
    names = (".weights.bin.0a_z9x8y.tmp", ".weights.bin.living00.tmp", ".config.json.0a_z9x8y.tmp")
    killed, young, other = (tmp_path / name for name in names)
    for leftover, age in ((killed, day + 60), (young, day - 60), (other, 9 * day)):
        leftover.touch()
        os.utime(leftover, (then := time.time() - age, then))
    write_text(path, "new")
    assert set(tmp_path.iterdir()) == {path, young, other}


def test_threads_that_write_at_the_same_time_keep_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    umask = os.umask

    def slow_umask(mask: int) -> int:
        before = umask(mask)
        time.sleep(0.02)
        return before

    monkeypatch.setattr(os, "umask", slow_umask)
    before = umask(0o027)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda n: write_text(tmp_path / str(n), ""), range(8)))
        assert umask(0o027) == 0o027
    finally:
        umask(before)


def test_parent_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "naïve\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "naïve\n".encode()


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_new_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "written", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "written")}
    assert len(modes) == 1


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path, link = tmp_path / "written", tmp_path / "link"
    path.touch()
    path.chmod(mode)
    link.symlink_to(path)
    for target in (path, link):
        write_text(target, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.name != "posix", reason="flags of open files are read as on POSIX")
def test_the_file_that_is_synced_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to sync another."""
    fcntl = pytest.importorskip("fcntl")
    modes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    write_text(tmp_path / "written", "")
    assert modes == [os.O_RDWR]


def test_sha256_of_a_file_of_several_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    # FIPS 180-2, appendix B.1
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


class TestErrors:
    """An error of the operating system becomes one line that names the target and the remedy."""

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (errno.ENOSPC, "No space left on device: free some space there"),
            (errno.EROFS, "Read-only file system: mount it for writing, or choose another folder"),
            (errno.EACCES, "Permission denied: allow writing there, or choose another folder"),
            (errno.EIO, "Input/output error: check the disk"),
        ],
    )
    @pytest.mark.parametrize("where", [(tempfile, "mkstemp"), (os, "fsync"), (os, "replace")])
    def test_a_failed_write_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[object, str], code: int, message: str
    ) -> None:
        path = tmp_path / "RESULTS.md"
        path.write_text("old")

        def fail(*arguments: object, **_: object) -> None:
            names = [str(path) for path in arguments if isinstance(path, Path)]  # of os.replace, as in its own error
            raise OSError(code, os.strerror(code), *names[:1])

        monkeypatch.setattr(*where, fail)
        with pytest.raises(FileError, match=f"^{re.escape(f'{path}: cannot be written: {message}')}") as caught:
            write_text(path, "new")
        assert (caught.value.errno, caught.value.strerror) == (code, os.strerror(code))
        assert (caught.value.path, isinstance(caught.value, CnvzooError)) == (path, True)
        monkeypatch.undo()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        "write",
        [lambda path: path.write_bytes(bytes(10_000)), lambda path: save_file({"weights": np.zeros(10_000)}, path)],
        ids=["bytes", "safetensors"],
    )
    def test_on_a_full_disk(
        self, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]], write: Callable[[Path], object]
    ) -> None:
        path = tmp_path / "weights.safetensors"
        path.write_bytes(b"old")
        with full_disk(4096), pytest.raises(FileError) as caught, replacing(path) as temporary:
            write(temporary)
        assert str(caught.value).startswith(f"{path}: cannot be written: File too large: raise the limit on the size")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("below", ["file", "file/x", "file/x/y"])
    def test_a_file_in_place_of_a_folder(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("kept")
        path = tmp_path / below / "m.onnx"
        with pytest.raises(FileError) as caught:
            write_text(path, "")
        file = tmp_path / "file"
        assert str(caught.value) == f"{path}: cannot be written: {file} is a file, not a folder: choose another folder"
        assert file.read_text() == "kept"

    def test_a_folder_in_place_of_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=rf"^{tmp_path}: cannot be written: Is a directory: give the path"):
            write_text(tmp_path, "")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files from anyone")
    @pytest.mark.parametrize("path", ["/proc/x.onnx", "/proc/x/y.onnx"])
    def test_a_folder_that_takes_no_files(self, path: str) -> None:
        with pytest.raises(FileError, match=rf"^{path}: cannot be written: No such file .*: choose another folder$"):
            write_text(path, "")

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"x: cannot be written: File name too long: choose a shorter name$"):
            write_text(tmp_path / ("x" * 300), "")

    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError(errno.ENOENT, "No such file or directory", "photo.png"),
            ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            OSError("without errno"),
        ],
    )
    def test_errors_that_are_not_about_writing_are_not_changed(self, tmp_path: Path, error: OSError) -> None:
        with pytest.raises(OSError, match=re.escape(str(error))) as caught, replacing(tmp_path / "file"):
            raise error
        assert caught.value is error

    def test_temporary_files_that_cannot_be_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / ".state.x.tmp").touch()

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "another name")

        monkeypatch.setattr(Path, "unlink", fail)
        with pytest.raises(FileError, match=rf"^{tmp_path / 'state'}: cannot be written: Read-only file system: "):
            remove_leftovers(tmp_path / "state")


def test_a_file_that_is_up_to_date_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "RESULTS.md"
    assert update_text(path, "naïve\n")
    before = path.stat()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    assert not update_text(path, "naïve\n")
    with pytest.raises(FileError, match="Read-only"):
        update_text(path, "naïve\r\n")
    assert path.read_bytes() == "naïve\n".encode()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/runs") == tmp_path / "runs"
    assert expanded("runs/~x") == Path("runs/~x")
    with pytest.raises(FileError) as caught:
        expanded("~no-such-user/runs")
    assert str(caught.value) == "~no-such-user/runs: ~no-such-user is not a known home folder: write the path without ~"


def test_an_error_is_the_same_in_another_process(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        write_text(tmp_path, "")
    for error in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert (str(error), error.path, error.errno) == (str(caught.value), tmp_path, errno.EISDIR)


class TestSpecialFiles:
    """Links, pipes and devices are written through, and not replaced by regular files."""

    def test_a_symbolic_link_stays_and_the_file_behind_it_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        target = tmp_path / "elsewhere" / "m.onnx"
        link, second = tmp_path / "link.onnx", tmp_path / "second.onnx"
        link.symlink_to("elsewhere/m.onnx")
        second.symlink_to(link)
        for path, text in ((link, "made"), (second, "replaced")):  # the first leads to what is not there yet
            write_text(path, text)
            assert link.is_symlink()
            assert second.is_symlink()
            assert target.read_text() == text
        assert list(target.parent.iterdir()) == [target]

    def test_links_in_a_loop_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(FileError, match=r"a: cannot be written: Too many .*: a symbolic link leads to itself"):
            write_text(tmp_path / "a", "")
        assert (tmp_path / "a").is_symlink()

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are those of POSIX")
    def test_a_pipe_gets_the_bytes(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with ThreadPoolExecutor(1) as thread:
            reader = thread.submit((tmp_path / "pipe").read_text)
            write_text(tmp_path / "pipe", "content")
            assert reader.result(timeout=10) == "content"
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    @pytest.mark.skipif(os.name != "posix", reason="devices are those of POSIX")
    def test_a_device_gets_the_bytes(self, tmp_path: Path) -> None:
        reader, terminal = os.openpty()
        try:
            link = tmp_path / "link"
            link.symlink_to(os.ttyname(terminal))
            for path in (Path(os.ttyname(terminal)), link):
                write_text(path, "content")
                assert os.read(reader, 100) == b"content"
            assert stat.S_ISCHR(link.stat().st_mode)
            assert list(tmp_path.iterdir()) == [link]
        finally:
            os.close(reader)
            os.close(terminal)
