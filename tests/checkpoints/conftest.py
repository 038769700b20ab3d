"""A local fake of the Hugging Face Hub, a store that reads and writes it, and a checkpoint to publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_http import GOOD_TOKEN
from fake_hub import FakeHub
from huggingface_hub import close_session, constants

from cnvzoo.checkpoints.format import FileFacts
from cnvzoo.checkpoints.huggingface import HubStore
from cnvzoo.checkpoints.retry import RetryPolicy

NAME = "resnet20.mnist"
CARD = "---\nlicense: apache-2.0\n---\n\n# A checkpoint\n"
SHORT = RetryPolicy(tries=3, first_wait=0.001, timeout=0.3)


@pytest.fixture(scope="session")
def hub_server() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server
    close_session()


@pytest.fixture
def hub(hub_server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """An empty fake Hub, for a user who is logged in and may write; the waits of the client are short."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.001)))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", SHORT.timeout)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="session")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published_folder")


@pytest.fixture
def checkpoint(published_folder: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """The folder of a checkpoint that can be published and loaded; shared by all tests, which must not change it."""
    if not (published_folder / NAME).exists():
        (make_checkpoint(published_folder, "resnet20", "mnist") / "README.md").write_text(CARD)
    return published_folder / NAME


@pytest.fixture
def contents(checkpoint: Path) -> dict[str, bytes]:
    """The content of the checkpoint's files, by name."""
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture
def facts(contents: dict[str, bytes]) -> dict[str, FileFacts]:
    """Size and checksum of the checkpoint's files, as an index has them."""
    return {name: FileFacts.of(content) for name, content in contents.items()}


@pytest.fixture
def store(hub: FakeHub, tmp_path: Path) -> HubStore:
    """The organisation `zoo` of the fake Hub, with an empty cache."""
    return HubStore("zoo", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", retry=SHORT)
