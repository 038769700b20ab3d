"""Files are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cnvzoo.files import remove_leftovers, replacing, sha256_of, write_text


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new, half")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent  # a rename across file systems would not be one step
        temporary.write_bytes(b"new, whole")
    assert path.read_bytes() == b"new, whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_litter(
    tmp_path: Path, old: bytes | None, error: type[BaseException]
) -> None:
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


def test_leftovers_of_a_path_are_removed_and_nothing_else(tmp_path: Path) -> None:
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


def test_the_next_writer_removes_what_a_killed_one_left_a_day_ago(tmp_path: Path) -> None:
    path, day = tmp_path / "weights.bin", 24 * 3600
    names = (".weights.bin.0a_z9x8y.tmp", ".weights.bin.living00.tmp", ".config.json.0a_z9x8y.tmp")
    killed, young, other = (tmp_path / name for name in names)
    for leftover, age in ((killed, day + 60), (young, day - 60), (other, 9 * day)):
        leftover.touch()
        os.utime(leftover, (then := time.time() - age, then))
    write_text(path, "new")
    assert set(tmp_path.iterdir()) == {path, young, other}


def test_threads_that_write_at_once_leave_the_umask_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_new_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "written", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "written")}
    assert len(modes) == 1


def test_sha256_of_a_file_of_several_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    # FIPS 180-2, appendix B.1
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
