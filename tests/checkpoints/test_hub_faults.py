"""Whatever goes wrong between here and the Hub ends in a retry that succeeds, or in an error that says what to do.

Every stage of a download and of an upload meets every fault, once and for good. What must never be: a file other than
the published one where that is expected, a commit with some of the files, a second commit of the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants, file_download

from cnvzoo.checkpoints.format import FileFacts, StoreError
from cnvzoo.checkpoints.huggingface import HubStore
from cnvzoo.checkpoints.retry import Patience

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload

DOWNLOAD = ("info", "head", "get", "storage_get")
UPLOAD = ("info", "create", "validate", "preupload", "batch", "upload", "verify", "commit", "refs", "tag")
FAULTS = ("cut", "cut_after", "truncated", "wrong", "drip", "stall", 401, 403, 404, 429, 500)
REMEDIES = {
    401: "hf auth login",
    403: "hf auth login",
    404: "check",
    429: "try again in 2 seconds",
    500: "try again in some minutes",
    "cut": "Check the network",
    "cut_after": "Check the network",
    "truncated": "Check the network",
    "stall": "Check the network",
    "wrong": "try again",
}


REFUSALS = (401, 403, 404)  # final: asking again would change nothing


def is_harmless(stage: str, fault: str | int) -> bool:
    """A slow answer is an answer, and what has no body cannot be cut short or changed."""
    bodiless = stage == "head" or (stage, fault) == ("upload", "truncated")
    return fault == "drip" or (bodiless and fault in ("truncated", "wrong"))


def is_overcome(stage: str, fault: str | int) -> bool:
    """Of uploads: the work was done, only the answer is lost, and asking again finds that out."""
    done = {"commit": ("cut_after", "truncated", "wrong"), "upload": ("cut_after",)}
    done["tag"] = done["commit"]
    return is_harmless(stage, fault) or fault in done.get(stage, ()) or (stage == "verify" and fault not in REFUSALS)


@contextmanager
def impatient(store: HubStore, fault: str | int, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStore]:
    """The same store, which waits for hardly anything where an answer never comes."""
    if fault != "stall":
        yield store
        return
    seconds = 0.03
    patience = Patience(tries=2, first_wait=0.001, read_timeout=seconds, write_timeout=seconds)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
        patch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", seconds)
        yield HubStore("zoo", endpoint=store._endpoint, cache_dir=store._cache_dir, patience=patience)


@pytest.fixture
def name(checkpoint: Path) -> str:
    return checkpoint.name


@pytest.fixture
def published(store: HubStore, checkpoint: Path, hub: FakeHub) -> FakeHub:
    store.publish(checkpoint, message="first")
    hub.requests.clear()
    return hub


def check_cache(store: HubStore, contents: dict[str, bytes]) -> None:
    """Nothing in the cache but whole published files: no other bytes, no half of one, no temporary file."""
    for path in store._cache_dir.glob("*/snapshots/*/*"):
        assert path.read_bytes() == contents[path.name]
    for path in store._cache_dir.glob("*/blobs/*"):
        assert path.read_bytes() in contents.values()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", DOWNLOAD)
def test_a_download_that_fails_once(
    published: FakeHub, store: HubStore, name: str, contents: dict[str, bytes], facts: dict[str, FileFacts],
    stage: str, fault: str | int,
) -> None:  # fmt: skip
    published.fail(stage, fault, retry_after=2)
    if fault in REFUSALS:
        with pytest.raises(StoreError, match=REMEDIES[fault]) as caught:
            store.fetch(name, facts)
        assert str(fault) in str(caught.value)
        check_cache(store, contents)
    folder = store.fetch(name, facts)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    check_cache(store, contents)
    assert published.faults[stage] == 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", DOWNLOAD)
def test_a_download_that_keeps_failing(
    published: FakeHub, store: HubStore, name: str, contents: dict[str, bytes], facts: dict[str, FileFacts],
    stage: str, fault: str | int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    published.fail(stage, fault, times=float("inf"), retry_after=2)
    if is_harmless(stage, fault):
        store.fetch(name, facts)
    else:
        remedy = "Update cnvzoo" if fault == "wrong" and "get" in stage else REMEDIES[fault]
        with impatient(store, fault, monkeypatch) as asked, pytest.raises(StoreError, match=remedy) as caught:
            asked.fetch(name, facts)
        assert f"zoo/{name}" in str(caught.value)
        assert published.endpoint in str(caught.value)
        assert not isinstance(fault, int) or str(fault) in str(caught.value)
        check_cache(store, contents)
        published.recover()
        store.fetch(name, facts)
    check_cache(store, contents)


def check_repo(hub: FakeHub, repo: str, contents: dict[str, bytes]) -> None:
    """The repository has none of the files or all of them, in one commit, and a tag only there."""
    if repo in hub.repos:
        first, *later = hub.repos[repo].commits
        assert set(first.files) == {".gitattributes"}
        assert len(later) <= 1
        assert not later or hub.contents(repo) == contents
        assert all(commit == later[0].id for commit in hub.repos[repo].tags.values())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", UPLOAD)
def test_an_upload_that_fails_once(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes], stage: str, fault: str | int
) -> None:
    repo = f"zoo/{checkpoint.name}"
    hub.fail(stage, fault, retry_after=2)
    is_made = (stage, fault) == ("info", 404)  # what is not there is made
    is_refused = (stage, fault) == ("upload", "wrong")  # by the storage, which knows the sha256
    if (fault in REFUSALS and not is_made) or is_refused:
        with pytest.raises(StoreError, match=REMEDIES[fault]):
            store.publish(checkpoint, message="first", tag="v1")
        check_repo(hub, repo, contents)
    store.publish(checkpoint, message="first", tag="v1")
    check_repo(hub, repo, contents)
    assert hub.contents(repo, "v1") == contents
    assert hub.faults[stage] == 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", UPLOAD)
def test_an_upload_that_keeps_failing(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes], stage: str, fault: str | int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    repo = f"zoo/{checkpoint.name}"
    hub.fail(stage, fault, times=float("inf"), retry_after=2)
    if is_overcome(stage, fault):
        store.publish(checkpoint, message="first", tag="v1")
    else:
        with impatient(store, fault, monkeypatch) as asked, pytest.raises(StoreError, match=REMEDIES[fault]) as caught:
            asked.publish(checkpoint, message="first", tag="v1")
        assert repo in str(caught.value)
        assert hub.endpoint in str(caught.value)
        assert not isinstance(fault, int) or str(fault) in str(caught.value)
        check_repo(hub, repo, contents)
        hub.recover()
        publication = store.publish(checkpoint, message="first", tag="v1")
        assert (publication.commit is None) == (publication.to_write == ())
    check_repo(hub, repo, contents)
    assert hub.contents(repo, "v1") == contents
