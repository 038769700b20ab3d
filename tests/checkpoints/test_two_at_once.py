"""Two processes that fetch, or publish, the same checkpoint at the same time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_http import GOOD_TOKEN
from fake_hub import FakeHub
from samples import content_of

from cnvzoo.checkpoints.format import FileFacts
from cnvzoo.checkpoints.huggingface import HubStore

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload

REPO = "zoo/resnet20.mnist"


class Pair:
    """Two processes with one cache."""

    def __init__(self, endpoint: str, cache: Path) -> None:
        self.cache = cache
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), endpoint, str(cache)]
        environment = {**os.environ, "HF_TOKEN": GOOD_TOKEN, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        self.processes = [
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]

    def perform(self, *tasks: dict[str, Any]) -> list[dict[str, Any]]:
        """Give each process its task, to begin at once; returns their answers."""
        for process, task in zip(self.processes, tasks, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(task | {"at": time.time() + 0.05}) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self.processes if process.stdout]


@pytest.fixture(scope="module")
def pair(hub_server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(hub_server.endpoint, tmp_path_factory.mktemp("cache"))
    yield pair
    for process in pair.processes:
        process.communicate()  # the worker ends at the end of its input
        assert process.returncode == 0


@pytest.fixture
def versions(checkpoint: Path, tmp_path: Path) -> list[Path]:
    """Two folders of the same checkpoint, with other cards and configs."""
    folders = [tmp_path / str(number) / checkpoint.name for number in range(2)]
    for number, folder in enumerate(folders):
        shutil.copytree(checkpoint, folder)
        with (folder / "README.md").open("a") as card:
            card.write(f"version {number}\n")
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n" * number)
    return folders


@pytest.mark.parametrize("damaged", [False, True])
def test_downloading(
    pair: Pair, hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes],
    facts: dict[str, FileFacts], damaged: bool,
) -> None:  # fmt: skip
    store.publish(checkpoint, message="first")
    files = {name: [known.sha256, known.size] for name, known in facts.items()}
    task = {"do": "fetch", "name": checkpoint.name, "files": files}
    shutil.rmtree(pair.cache)
    if damaged:
        (first, _) = pair.perform(task, task)
        (Path(first["folder"]) / "model.safetensors").write_bytes(b"damaged")
        hub.requests.clear()
    hub.fail("storage_get", "drip")
    first, second = pair.perform(task, task)
    assert first == second
    assert content_of(Path(first["folder"])) == contents
    assert hub.requests["storage_get"] <= (2 if damaged else 1)  # a second download of a new file waits for the first


def test_publishing_the_same(
    pair: Pair, hub: FakeHub, checkpoint: Path, contents: dict[str, bytes]
) -> None:  # fmt: skip
    hub.fail("preupload", "drip", times=2)
    task = {"do": "publish", "folder": str(checkpoint)}
    answers = pair.perform(task, task)
    assert not any("error" in answer for answer in answers), answers
    assert hub.contents(REPO) == contents
    assert len(hub.repos[REPO].commits) == 2  # the initial one of the Hub, and one for the checkpoint


def test_publishing_two_versions_to_the_hub_never_mixes_them(pair: Pair, hub: FakeHub, versions: list[Path]) -> None:
    hub.fail("preupload", "drip", times=2)
    answers = pair.perform(*({"do": "publish", "folder": str(folder)} for folder in versions))
    assert not any("error" in answer for answer in answers), answers
    wanted = [content_of(folder) for folder in versions]
    commits = hub.repos[REPO].commits[1:]
    assert len(commits) == 2
    assert all(hub.contents(REPO, commit.id) in wanted for commit in commits)
    assert hub.contents(REPO, commits[0].id) != hub.contents(REPO, commits[1].id)


def test_publishing_two_versions_to_a_directory_never_mixes_them(
    pair: Pair, hub: FakeHub, versions: list[Path], tmp_path: Path
) -> None:
    for _ in range(5):
        tasks = [{"do": "publish", "folder": str(folder), "to": str(tmp_path / "store")} for folder in versions]
        answers = pair.perform(*tasks)
        assert not any("error" in answer for answer in answers), answers
        assert content_of(tmp_path / "store" / versions[0].name) in [content_of(folder) for folder in versions]
