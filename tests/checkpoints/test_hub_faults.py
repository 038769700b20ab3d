"""Faults of connections to the Hub: a retry succeeds, or one error says what failed and what to do.

Never accepted: another file than the published one, a commit with some of the files, the same commit twice.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import FakeHub

from cnvzoo.checkpoints.format import FileFacts, StoreError
from cnvzoo.checkpoints.huggingface import HubStore

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload

NAME, REPO = "resnet20.mnist", "zoo/resnet20.mnist"


@pytest.fixture
def published(store: HubStore, checkpoint: Path, hub: FakeHub) -> FakeHub:
    store.publish(checkpoint, message="first")
    hub.requests.clear()
    return hub


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("info", "cut"), ("info", "cut_after"), ("info", "truncated"), ("info", "wrong"), ("info", "stall"),
        ("info", 429), ("info", 500), ("head", "cut"), ("head", "stall"), ("head", 500), ("get", "truncated"),
        ("get", "wrong"), ("storage_get", "cut"), ("storage_get", "truncated"), ("storage_get", "wrong"),
        ("storage_get", "drip"), ("storage_get", "stall"), ("storage_get", 429), ("storage_get", 500),
    ],
)  # fmt: skip
def test_a_download_is_retried(
    published: FakeHub, store: HubStore, contents: dict[str, bytes], facts: dict[str, FileFacts],
    stage: str, fault: str | int,
) -> None:  # fmt: skip
    published.fail(stage, fault, retry_after=2)
    folder = store.fetch(NAME, facts)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert published.faults[stage] == 1


@pytest.mark.parametrize(
    ("stage", "fault", "words"),
    [
        ("info", 401, r"failed: 401 .*hf auth login"),
        ("info", 403, r"failed: 403 Forbidden .*hf auth login"),
        ("info", 404, r"GET zoo/resnet20.mnist from http://127.0.0.1:\d+ failed: 404 Not Found .*no such repository"),
        ("head", 403, r"GET zoo/resnet20.mnist/\S+ from .* failed: 403 Forbidden"),
        ("storage_get", 403, r"GET zoo/resnet20.mnist/model.safetensors from .* failed: 403 Forbidden"),
    ],
)
def test_a_download_that_the_server_refuses_is_not_retried(
    published: FakeHub, store: HubStore, facts: dict[str, FileFacts], stage: str, fault: int, words: str
) -> None:
    published.fail(stage, fault, times=float("inf"))
    with pytest.raises(StoreError, match=words):
        store.fetch(NAME, facts)
    assert published.faults[stage] == 1
    published.recover()
    store.fetch(NAME, facts)


@pytest.mark.parametrize(
    ("stage", "fault", "words"),
    [
        ("info", "cut", "Check the network"),
        ("info", "wrong", "Check the network"),
        ("info", "stall", "Check the network"),
        ("info", 429, "Too many requests: try again in 2 seconds"),
        ("head", 500, "500 Internal Server Error.*try again in a few minutes"),
        ("get", "truncated", "Check the network"),
        ("get", "wrong", "wrong bytes came twice: .*Update cnvzoo"),
        ("storage_get", "wrong", "wrong bytes came twice: .*Update cnvzoo"),
        ("storage_get", 500, "500 Internal Server Error.*try again in a few minutes"),
    ],
)
def test_a_download_that_keeps_failing(
    published: FakeHub, store: HubStore, contents: dict[str, bytes], facts: dict[str, FileFacts],
    stage: str, fault: str | int, words: str,
) -> None:  # fmt: skip
    published.fail(stage, fault, times=float("inf"), retry_after=2)
    with pytest.raises(StoreError, match=rf"^GET {REPO}(/\S+)? from {published.endpoint} failed: .*{words}"):
        store.fetch(NAME, facts)
    published.recover()
    folder = store.fetch(NAME, facts)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def check_repo(hub: FakeHub, contents: dict[str, bytes]) -> None:
    """The repository has none of the files, or all of them in one commit, and no tag on another commit."""
    if REPO in hub.repos:
        first, *later = hub.repos[REPO].commits
        assert set(first.files) == {".gitattributes"}
        assert len(later) <= 1
        assert not later or hub.contents(REPO) == contents
        assert all(commit == later[0].id for commit in hub.repos[REPO].tags.values())


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("info", "cut"), ("info", 500), ("create", "cut_after"), ("create", 500), ("validate", "cut"),
        ("preupload", "wrong"), ("batch", 500), ("upload", "cut"), ("upload", "cut_after"), ("upload", 429),
        ("verify", "truncated"), ("commit", "cut"), ("commit", "cut_after"), ("commit", "wrong"), ("commit", 500),
        ("tag", "cut"), ("tag", "cut_after"), ("tag", 429),
    ],
)  # fmt: skip
def test_an_upload_is_retried(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes], stage: str, fault: str | int
) -> None:
    hub.fail(stage, fault, retry_after=2)
    store.publish(checkpoint, message="first", tag="v1")
    assert hub.faults[stage] == 1
    check_repo(hub, contents)
    assert hub.contents(REPO, "v1") == contents


@pytest.mark.parametrize(
    ("stage", "fault", "times", "words"),
    [
        ("create", 403, 1, r"Creating zoo/resnet20.mnist at .* failed: 403 .*a token that can write"),
        ("preupload", 401, 1, r"Commit to zoo/resnet20.mnist at .* failed: 401 .*log in"),
        ("upload", "wrong", 1, r"Commit to .* failed: 400 Bad Request"),  # the storage knows the sha256
        ("commit", 403, 1, r"Commit to .* failed: 403"),
        ("tag", 403, 1, r"Tag v1 of .* failed: 403"),
        ("info", "truncated", float("inf"), r"GET .* failed: .*Check the network"),
        ("create", 429, float("inf"), r"Creating .* failed: 429 .*try again in 2 seconds"),
        ("upload", "cut", float("inf"), r"Commit to .* failed: no response.*Check the network"),
        ("commit", 500, float("inf"), r"Commit to .* failed: 500 Internal Server Error"),
        ("tag", "cut", float("inf"), r"Tag v1 of .* failed: no response"),
    ],
)
def test_an_upload_that_fails_can_be_repeated(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes], stage: str, fault: str | int,
    times: float, words: str,
) -> None:  # fmt: skip
    hub.fail(stage, fault, times=times, retry_after=2)
    with pytest.raises(StoreError, match=f"^{words}"):
        store.publish(checkpoint, message="first", tag="v1")
    check_repo(hub, contents)
    hub.recover()
    store.publish(checkpoint, message="first", tag="v1")
    check_repo(hub, contents)
    assert hub.contents(REPO, "v1") == contents


def test_an_answer_lost_every_time_does_not_repeat_the_commit(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes]
) -> None:
    hub.fail("commit", "cut_after", times=float("inf"))
    assert store.publish(checkpoint, message="first").commit == hub.repos[REPO].commits[-1].id
    check_repo(hub, contents)
