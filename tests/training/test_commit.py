"""The commit in a record: that of this package's checkout, and not that of another repository around it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cnvzoo.training.record import current_commit


def git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`src/cnvzoo` of a temporary folder, used as the location of the package."""
    folder = (tmp_path / "checkout" / "src" / "cnvzoo").resolve()
    folder.mkdir(parents=True)
    (folder / "code.py").write_text("x = 1\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.resolve()))
    return folder


def make_repository(folder: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed; this test makes a repository")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    who = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", "-c", "commit.gpgsign=false")
    git(folder, *who, "commit", "--quiet", "-m", "Begin")


def test_a_clean_checkout_has_its_commit(package: Path) -> None:
    make_repository(package.parents[1])
    found = current_commit(package)
    assert found == git(package, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", found or "")


@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_a_changed_package_is_marked(package: Path, name: str) -> None:
    make_repository(package.parents[1])
    (package / name).write_text("x = 2\n")
    assert re.fullmatch(r"[0-9a-f]{40}\+", current_commit(package) or "")


def test_changes_outside_the_package_are_not_marked(package: Path) -> None:
    make_repository(package.parents[1])
    (package.parents[1] / "notes.txt").write_text("unrelated\n")
    assert re.fullmatch("[0-9a-f]{40}", current_commit(package) or "")


def test_outside_a_checkout_there_is_no_commit(package: Path) -> None:
    assert current_commit(package) is None


def test_the_commit_of_a_repository_around_an_installed_package_is_not_used(package: Path) -> None:
    make_repository(package.parents[2])
    assert current_commit(package) is None


def test_a_repository_without_a_commit_gives_none(package: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed; this test makes a repository")
    git(package.parents[1], "init", "--quiet")
    assert current_commit(package) is None


def test_without_git_there_is_no_commit(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(package))
    assert current_commit(package) is None
