"""A folder as a store, and what every store accepts: plain names, regular files, and complete checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from samples import content_of

from cnvzoo import files
from cnvzoo.checkpoints.format import CheckpointError, FileFacts, StoreError
from cnvzoo.checkpoints.locations import open_store
from cnvzoo.checkpoints.store import Publication, Store

FILES = ("model.safetensors", "README.md", "config.json")
NAMES_THAT_LEAD_OUT = (
    "..", ".", "", "/etc/passwd", "../secret", "a/b", "a\\b", "..\\b", "~", ".hidden", "C:x", "a\0b", "a\n",
    "-option", "a b", "é", "x" * 129,
)  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def directory(root: Path) -> Store:
    return open_store(root)


@pytest.fixture
def own_copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may change."""
    shutil.copytree(checkpoint, tmp_path / "own_copy" / checkpoint.name)
    return tmp_path / "own_copy" / checkpoint.name


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_file_is_no_place_to_publish_to(checkpoint: Path, tmp_path: Path, dry_run: bool) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(StoreError, match=r"photo\.png: a file, not a folder: give a directory to publish to$"):
        open_store(tmp_path / "photo.png").publish(checkpoint, message="first", dry_run=dry_run)


def test_a_published_checkpoint_is_fetched_in_place(
    directory: Store, root: Path, checkpoint: Path, contents: dict[str, bytes], facts: dict[str, FileFacts]
) -> None:
    publication = directory.publish(checkpoint, message="first")
    assert publication == Publication("resnet20.mnist", str(root), new=FILES, changed=(), unchanged=())
    assert directory.fetch("resnet20.mnist", facts) == root / "resnet20.mnist"
    assert content_of(root / "resnet20.mnist") == contents


def test_a_second_publish_changes_nothing(directory: Store, root: Path, own_copy: Path) -> None:
    directory.publish(own_copy, message="first")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    assert directory.publish(own_copy, message="second").to_write == ()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.*")} == before
    (own_copy / "README.md").write_text("---\nlicense: mit\n---\n")
    assert directory.publish(own_copy, message="third").changed == ("README.md",)
    assert content_of(root / "resnet20.mnist") == content_of(own_copy)


@pytest.mark.parametrize("file", FILES)
def test_a_temporary_file_of_a_killed_writer_is_ignored(
    directory: Store, root: Path, own_copy: Path, contents: dict[str, bytes], facts: dict[str, FileFacts], file: str
) -> None:
    with files.replacing(own_copy / file) as temporary:
        temporary.write_bytes(contents[file])
    temporary.write_bytes(b"half of it")  # as if the process had been killed inside
    assert directory.publish(own_copy, message="first").new == FILES
    temporary.rename(root / "resnet20.mnist" / temporary.name)
    assert directory.publish(own_copy, message="second").unchanged == FILES
    folder = directory.fetch("resnet20.mnist", facts)
    assert content_of(folder) == contents | {temporary.name: b"half of it"}


def test_a_dry_run_writes_nothing(directory: Store, root: Path, checkpoint: Path) -> None:
    publication = directory.publish(checkpoint, message="first", dry_run=True)
    assert str(publication) == f"resnet20.mnist to {root}: would publish new {', '.join(FILES)}"
    assert not root.exists()


def test_the_config_is_written_last_so_an_interrupted_publish_leaves_no_checkpoint(
    directory: Store, root: Path, checkpoint: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, written = os.replace, []

    def stop_at_the_second(source: Path, target: Path) -> None:
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stop_at_the_second)
    with pytest.raises(StoreError, match=r"cannot be written: No space left on device: .*; the same command resumes"):
        directory.publish(checkpoint, message="first")
    assert [path.name for path in (root / "resnet20.mnist").iterdir()] == ["model.safetensors"]
    monkeypatch.undo()
    assert directory.publish(checkpoint, message="first").new == ("README.md", "config.json")
    assert content_of(root / "resnet20.mnist") == contents


def test_a_directory_has_no_tags(directory: Store, checkpoint: Path) -> None:
    with pytest.raises(StoreError, match="is a directory and has no tags: leave tag 'v1' out"):
        directory.publish(checkpoint, message="first", tag="v1")


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found(
    directory: Store, own_copy: Path, root: Path, facts: dict[str, FileFacts], file: str
) -> None:
    directory.publish(own_copy, message="first")
    path = root / "resnet20.mnist" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: expected sha256"):
        directory.fetch("resnet20.mnist", facts)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{path}: .*{facts[file].size:,} (bytes|were)"):
        directory.fetch("resnet20.mnist", facts)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
        directory.fetch("resnet20.mnist", facts)


def test_a_missing_checkpoint_is_an_error(
    directory: Store, root: Path, checkpoint: Path, facts: dict[str, FileFacts]
) -> None:
    with pytest.raises(StoreError, match=r": no such folder: give a directory of checkpoints with --hub, hub= or"):
        directory.fetch("resnet20.mnist", facts)
    root.mkdir()
    with pytest.raises(StoreError, match=r"no checkpoint 'resnet20.mnist' in .*: it has no checkpoints at all"):
        directory.fetch("resnet20.mnist", facts)
    directory.publish(checkpoint, message="first")
    with pytest.raises(StoreError, match=r"no checkpoint 'resnet2.mnist' in .*: did you mean 'resnet20.mnist'"):
        directory.fetch("resnet2.mnist", facts)


@pytest.mark.parametrize("name", NAMES_THAT_LEAD_OUT)
@pytest.mark.parametrize("kind", ["directory", "hub"])
def test_names_that_lead_out_of_the_folder_are_refused(
    kind: str, name: str, root: Path, facts: dict[str, FileFacts], request: pytest.FixtureRequest
) -> None:
    (root / "resnet20.mnist").mkdir(parents=True)
    (root.parent / "secret").write_bytes(b"")
    empty = next(iter(facts.values()))
    store = open_store(root) if kind == "directory" else request.getfixturevalue("store")
    with pytest.raises(StoreError, match=r"checkpoint: .*letters, digits.* refused"):
        store.fetch(name, facts)
    with pytest.raises(StoreError, match=r"a file of resnet20.mnist: .*letters, digits.* refused"):
        store.fetch("resnet20.mnist", {name: empty})


def test_symbolic_links_in_a_store_are_refused(
    directory: Store, root: Path, own_copy: Path, facts: dict[str, FileFacts], tmp_path: Path
) -> None:
    root.mkdir()
    (root / "resnet20.mnist").symlink_to(own_copy)
    with pytest.raises(StoreError, match="a symbolic link, which could lead out"):
        directory.fetch("resnet20.mnist", facts)
    with pytest.raises(StoreError, match="a symbolic link, which could lead out"):
        directory.publish(own_copy, message="through the link")
    (root / "resnet20.mnist").unlink()
    shutil.copytree(own_copy, root / "resnet20.mnist")
    outside = tmp_path / "outside"
    shutil.move(root / "resnet20.mnist" / "config.json", outside)
    (root / "resnet20.mnist" / "config.json").symlink_to(outside)
    with pytest.raises(StoreError, match=r"config.json: a symbolic link, which could lead out"):
        directory.fetch("resnet20.mnist", facts)
    with pytest.raises(StoreError, match=r"config.json: a symbolic link, which could lead out"):
        directory.publish(own_copy, message="through the link")
    assert outside.read_bytes() == (own_copy / "config.json").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="named pipes are POSIX")
def test_a_named_pipe_is_refused_and_not_opened(
    directory: Store, root: Path, own_copy: Path, facts: dict[str, FileFacts]
) -> None:
    shutil.copytree(own_copy, root / "resnet20.mnist")
    (root / "resnet20.mnist" / "config.json").unlink()
    os.mkfifo(root / "resnet20.mnist" / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json: not a regular file"):
        directory.fetch("resnet20.mnist", facts)


def without(name: str) -> Mapping[str, bytes | None]:
    return {name: None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (without("config.json"), "config.json missing; published are model.safetensors, README.md, config.json"),
        (without("README.md"), "README.md missing.*write the card with cnvzoo.write_card"),
        ({".env": b"TOKEN=secret"}, ".env does not belong to a checkpoint: move it elsewhere"),
        ({"model.bin": b""}, "model.bin does not belong to a checkpoint"),
        ({".model.bin.abcd1234.tmp": b""}, ".model.bin.abcd1234.tmp does not belong to a checkpoint"),
        ({"config.json": b"{}"}, "config.json: not a valid checkpoint config"),
        ({"model.safetensors": b"other"}, "model.safetensors: not the file that config.json describes"),
    ],
)
def test_an_incomplete_or_invalid_checkpoint_is_not_published(
    directory: Store, root: Path, own_copy: Path, changes: dict[str, bytes | None], said: str
) -> None:
    for name, content in changes.items():
        (own_copy / name).unlink(missing_ok=True)
        if content is not None:
            (own_copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        directory.publish(own_copy, message="first")
    assert not root.exists()


def test_what_tools_leave_in_a_folder_is_not_published(directory: Store, root: Path, own_copy: Path) -> None:
    for name in (".DS_Store", ".gitattributes"):
        (own_copy / name).write_bytes(b"x")
    for name in (".cache", ".git"):
        (own_copy / name).mkdir()
    directory.publish(own_copy, message="first")
    assert {path.name for path in (root / own_copy.name).iterdir()} == set(FILES)


def test_a_symbolic_link_is_not_published(directory: Store, root: Path, own_copy: Path, tmp_path: Path) -> None:
    shutil.move(own_copy / "README.md", tmp_path / "outside")
    (own_copy / "README.md").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match=r"README.md: a symbolic link"):
        directory.publish(own_copy, message="first")
    with pytest.raises(StoreError, match=r"nowhere: not a folder"):
        directory.publish(own_copy.with_name("nowhere"), message="first")
    renamed = own_copy.rename(own_copy.with_name("resnet32.mnist"))
    (renamed / "README.md").unlink()
    (renamed / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(StoreError, match=r"name is 'resnet20.mnist', and the folder is 'resnet32.mnist': rename"):
        directory.publish(renamed, message="first")
    assert not root.exists()
