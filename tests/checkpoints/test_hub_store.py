"""Publishing to the Hub and fetching from it, with the unmodified client of huggingface_hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fake_http import READ_TOKEN
from fake_hub import FakeHub
from fake_repos import Blob, Commit
from huggingface_hub import HfApi, close_session, constants

from cnvzoo.checkpoints.format import FileFacts, StoreError
from cnvzoo.checkpoints.huggingface import HubStore
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.checkpoints.locations import open_store
from cnvzoo.checkpoints.retry import RetryPolicy
from cnvzoo.checkpoints.store import Publication
from cnvzoo.zoo import create_model

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload

FILES = ("model.safetensors", "README.md", "config.json")
REPO = "zoo/resnet20.mnist"


@pytest.fixture
def other(checkpoint: Path, tmp_path: Path) -> Path:
    """The same checkpoint with another card."""
    folder = tmp_path / "other" / checkpoint.name
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore is known now.\n")
    return folder


def facts_in(folder: Path) -> dict[str, FileFacts]:
    return {path.name: FileFacts.of(path.read_bytes()) for path in folder.iterdir()}


def test_a_published_checkpoint_is_fetched_as_the_same_model(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes], facts: dict[str, FileFacts]
) -> None:
    publication = store.publish(checkpoint, message="Publish it")
    commit = hub.repos[REPO].commits[-1]
    assert publication == Publication(
        "resnet20.mnist", "hf://zoo", new=FILES, changed=(), unchanged=(), commit=commit.id
    )
    assert commit.message == "Publish it"
    assert hub.contents(REPO) == contents
    folder = store.fetch("resnet20.mnist", facts)
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = [load_checkpoint(path)[0](images) for path in (checkpoint, folder)]
    assert torch.equal(*logits)


def test_a_second_publish_changes_nothing(hub: FakeHub, store: HubStore, checkpoint: Path) -> None:
    store.publish(checkpoint, message="first")
    commits = list(hub.repos[REPO].commits)
    hub.requests.clear()
    publication = store.publish(checkpoint, message="second")
    assert publication == Publication("resnet20.mnist", "hf://zoo", new=(), changed=(), unchanged=FILES)
    assert str(publication) == "resnet20.mnist to hf://zoo: unchanged"
    assert hub.repos[REPO].commits == commits
    assert hub.requests == {"info": 1}


def test_only_changed_files_are_sent_in_one_commit(
    hub: FakeHub, store: HubStore, checkpoint: Path, other: Path
) -> None:
    store.publish(checkpoint, message="first")
    hub.requests.clear()
    publication = store.publish(other, message="second")
    assert (publication.new, publication.changed) == ((), ("README.md",))
    assert publication.unchanged == ("model.safetensors", "config.json")
    assert hub.requests["upload"] == 0
    assert len(hub.repos[REPO].commits) == 3  # the initial one of the Hub, and two
    assert hub.contents(REPO) == {path.name: path.read_bytes() for path in other.iterdir()}


def test_a_dry_run_reports_the_files_and_sends_nothing(
    hub: FakeHub, store: HubStore, checkpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication = store.publish(checkpoint, message="first", tag="v1", dry_run=True)
    assert str(publication) == (
        "resnet20.mnist to hf://zoo: would publish new model.safetensors, README.md, config.json, would tag v1"
    )
    assert hub.repos == {}
    store.publish(checkpoint, message="first")
    monkeypatch.delenv("HF_TOKEN")  # comparing needs no login
    publication = store.publish(other, message="second", dry_run=True)
    assert str(publication) == "resnet20.mnist to hf://zoo: would publish changed README.md"
    assert len(hub.repos[REPO].commits) == 2


def test_cached_files_cost_no_request(
    hub: FakeHub, store: HubStore, checkpoint: Path, facts: dict[str, FileFacts]
) -> None:
    store.publish(checkpoint, message="first")
    folder = store.fetch("resnet20.mnist", facts)
    hub.requests.clear()
    assert store.fetch("resnet20.mnist", facts) == folder
    assert not hub.requests
    offline = HubStore("zoo", "v9", endpoint="http://127.0.0.1:9", cache_dir=store.cache_dir, retry=RetryPolicy())
    assert offline.fetch("resnet20.mnist", facts) == folder


def test_offline_without_cached_files(
    store: HubStore, facts: dict[str, FileFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match=r"HF_HUB_OFFLINE is set, and the file is not in the cache\. Unset it"):
        store.fetch("resnet20.mnist", facts)


def test_a_closed_port_is_an_error(tmp_path: Path, facts: dict[str, FileFacts]) -> None:
    retry = RetryPolicy(tries=2, first_wait=0.001)
    store = HubStore("zoo", endpoint="http://127.0.0.1:9", cache_dir=tmp_path, retry=retry)
    with pytest.raises(StoreError, match=r"GET zoo/resnet20.mnist from .* failed: .*Check the network"):
        store.fetch("resnet20.mnist", facts)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda good: b"?" + good[1:]),
        ("model.safetensors", lambda good: good[:-1]),
        ("README.md", lambda good: b"?" + good[1:]),
        ("config.json", lambda good: b""),
    ],
)
def test_a_damaged_file_in_the_cache_is_fetched_again(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes], facts: dict[str, FileFacts],
    file: str, damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    store.publish(checkpoint, message="first")
    folder = store.fetch("resnet20.mnist", facts)
    (folder / file).write_bytes(damage(contents[file]))
    hub.requests.clear()
    assert store.fetch("resnet20.mnist", facts) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert hub.requests["get"] + hub.requests["storage_get"] == 1


def test_a_folder_in_the_place_of_a_cached_file_is_named(
    store: HubStore, checkpoint: Path, facts: dict[str, FileFacts]
) -> None:
    store.publish(checkpoint, message="first")
    path = store.fetch("resnet20.mnist", facts) / "config.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(
        StoreError, match=r"config\.json: cannot be replaced \(.*\): delete it, or choose another cache"
    ):
        store.fetch("resnet20.mnist", facts)


def test_another_version_on_the_hub_is_refused_before_the_download(
    hub: FakeHub, store: HubStore, checkpoint: Path, other: Path, facts: dict[str, FileFacts]
) -> None:
    store.publish(checkpoint, message="first", tag="v1")
    store.publish(other, message="second")
    hub.requests.clear()
    with pytest.raises(StoreError, match=r"README.md .* has another file of .*hub='hf://ORG@TAG'"):
        store.fetch("resnet20.mnist", facts)
    assert hub.requests == {"info": 1}
    pinned = HubStore("zoo", "v1", endpoint=hub.endpoint, cache_dir=store.cache_dir, retry=RetryPolicy())
    folder = pinned.fetch("resnet20.mnist", facts)
    assert folder.name == hub.repos[REPO].tags["v1"]
    assert store.fetch("resnet20.mnist", facts_in(other)).name == hub.repos[REPO].commits[-1].id


def test_missing_repositories_files_and_revisions(
    hub: FakeHub, store: HubStore, checkpoint: Path, facts: dict[str, FileFacts], tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"GET zoo/resnet20.mnist from .* failed: 404.*no such repository"):
        store.fetch("resnet20.mnist", facts)
    store.publish(checkpoint, message="first")
    with pytest.raises(StoreError, match=r"zoo/a--b: not a valid name of a repository"):
        store.fetch("a--b", facts)
    with pytest.raises(StoreError, match=r"labels.txt .*has no such file"):
        store.fetch("resnet20.mnist", facts | {"labels.txt": FileFacts("0" * 64, 1)})
    pinned = HubStore("zoo", "v7", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", retry=RetryPolicy())
    with pytest.raises(
        StoreError, match=r"GET zoo/resnet20.mnist@v7 from .* failed: 404.*Check the name and the revision"
    ):
        pinned.fetch("resnet20.mnist", facts)


def test_publishing_needs_a_token_that_can_write(
    hub: FakeHub, store: HubStore, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreError, match=r"401 .*log in with 'hf auth login'"):
        store.publish(checkpoint, message="first")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(StoreError, match=r"403 .*a token that can write"):
        store.publish(checkpoint, message="first")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(StoreError, match=r"401 .*log in with 'hf auth login'"):
        store.publish(checkpoint, message="first")
    assert hub.repos == {}


def test_a_tag_may_be_at_an_older_commit_with_the_same_files(
    hub: FakeHub, store: HubStore, checkpoint: Path, other: Path
) -> None:
    tagged = store.publish(checkpoint, message="first", tag="v1").commit
    repo = hub.repos[REPO]
    licence = Blob(b"a licence", is_lfs=False)
    repo.commits.append(Commit("A licence", tagged, repo.commits[-1].files | {"LICENSE": licence}))
    assert store.publish(checkpoint, message="again", tag="v1").unchanged == FILES
    store.publish(other, message="second")
    assert store.publish(checkpoint, message="back", tag="v1").changed == ("README.md",)
    assert repo.tags == {"v1": tagged}


def test_a_tag_is_set_once_and_never_moved(hub: FakeHub, store: HubStore, checkpoint: Path, other: Path) -> None:
    commit = store.publish(checkpoint, message="first", tag="v1").commit
    assert hub.repos[REPO].tags == {"v1": commit}
    assert store.publish(checkpoint, message="again", tag="v1").commit is None
    with pytest.raises(StoreError, match=r"tag v1 is at commit .*never moved: choose a new one; nothing was pub"):
        store.publish(other, message="second", tag="v1")
    assert len(hub.repos[REPO].commits) == 2
    second = store.publish(other, message="second", tag="v2").commit
    store.publish(other, message="second", tag="v2.1")
    assert hub.repos[REPO].tags == {"v1": commit, "v2": second, "v2.1": second}


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_branch_is_not_taken_for_a_tag(
    hub: FakeHub, store: HubStore, checkpoint: Path, other: Path, dry_run: bool
) -> None:
    says = f"^{REPO}: main is a branch, and a tag needs a name of its own: choose another one$"
    with pytest.raises(StoreError, match=says):
        store.publish(checkpoint, message="first", tag="main", dry_run=dry_run)
    assert hub.repos == {}
    store.publish(checkpoint, message="first")
    repo = hub.repos[REPO]
    repo.branches["next"] = repo.commits[-1].id
    for tag in ("main", "next"):
        for folder in (checkpoint, other):
            with pytest.raises(StoreError, match=says.replace("main", tag)):
                store.publish(folder, message="second", tag=tag, dry_run=dry_run)
    assert (len(repo.commits), repo.tags) == (2, {})


def test_a_commit_is_not_taken_for_a_tag(hub: FakeHub, store: HubStore, checkpoint: Path, other: Path) -> None:
    first = store.publish(checkpoint, message="first").commit
    second = store.publish(other, message="second", tag=first).commit
    assert hub.repos[REPO].tags == {first: second}


def test_a_commit_of_another_publisher_during_the_upload(
    hub: FakeHub, store: HubStore, checkpoint: Path, contents: dict[str, bytes], other: Path, tmp_path: Path
) -> None:
    store.publish(other, message="first")
    second = HubStore("zoo", endpoint=hub.endpoint, cache_dir=tmp_path, retry=RetryPolicy(first_wait=0.001))
    hub.before("commit", lambda: store.publish(checkpoint, message="in between"))
    shutil.copytree(other, tmp_path / "third" / checkpoint.name)
    (tmp_path / "third" / checkpoint.name / "README.md").write_text("---\nlicense: mit\n---\n")
    second.publish(tmp_path / "third" / checkpoint.name, message="last")
    assert [commit.message for commit in hub.repos[REPO].commits[1:]] == ["first", "in between", "last"]
    assert hub.contents(REPO) == contents | {"README.md": b"---\nlicense: mit\n---\n"}
    assert hub.requests["commit"] == 4  # one was refused


def test_a_server_without_xet_storage(store: HubStore, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(StoreError, match=r"^Commit to zoo/resnet20.mnist .* failed: .*set HF_HUB_DISABLE_XET=1"):
        store.publish(checkpoint, message="first")


def test_a_wait_longer_than_the_deadline_is_an_error(
    hub: FakeHub, store: HubStore, checkpoint: Path, facts: dict[str, FileFacts]
) -> None:
    store.publish(checkpoint, message="first")
    hub.requests.clear()
    hub.fail("info", 429, times=9, retry_after=3600)
    with pytest.raises(StoreError, match="try again in 3600 seconds"):
        store.fetch("resnet20.mnist", facts)
    assert hub.requests == {"info": 1}


def test_waits_double_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("cnvzoo.checkpoints.retry.time.sleep", waits.append)

    def fail() -> None:
        raise ConnectionResetError

    with pytest.raises(StoreError, match=r"^GET x failed: no response.*ConnectionResetError"):
        RetryPolicy(tries=4, first_wait=1.5).call("GET x", fail)
    assert waits == [1.5, 3.0, 6.0]
    waits.clear()
    with pytest.raises(StoreError):
        RetryPolicy(tries=4, first_wait=15, deadline=40).call("GET x", fail)
    assert waits == [15, 30]


def test_a_full_disk_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnvzoo.checkpoints.retry.time.sleep", lambda _: pytest.fail("waited"))

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"a local file cannot be written: No space left on device. Free some space"):
        RetryPolicy().call("GET x", fail)


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        ("HF_TOKEN", "hf_\xe4bc", "UnicodeEncodeError"),
        ("HF_ENDPOINT", "huggingface.co", "UnsupportedProtocol"),
        ("SSL_CERT_FILE", "/nonexistent.pem", "FileNotFoundError"),
        ("ALL_PROXY", "socks5://127.0.0.1:9", "ImportError"),
    ],
)
def test_a_mistake_in_the_settings_is_not_taken_for_the_network(
    hub: FakeHub, tmp_path: Path, facts: dict[str, FileFacts], monkeypatch: pytest.MonkeyPatch,
    variable: str, value: str, names: str,
) -> None:  # fmt: skip
    if variable == "ALL_PROXY" and find_spec("socksio"):
        pytest.skip("socksio is installed")
    monkeypatch.setattr("cnvzoo.checkpoints.retry.time.sleep", lambda _: pytest.fail("waited"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv(variable, value)
    close_session()  # the client reads these variables when it is made
    says = rf"failed: no request can be made \({names}: .*\)\. Check HF_TOKEN, HF_ENDPOINT, SSL_CERT_FILE and the proxy"
    try:
        with pytest.raises(StoreError, match=says) as caught:
            HubStore("zoo", cache_dir=tmp_path).fetch("resnet20.mnist", facts)
    finally:
        close_session()
    assert "\xe4bc" not in str(caught.value)


def test_the_fake_hub_answers_other_requests_of_the_client(hub: FakeHub, store: HubStore, checkpoint: Path) -> None:
    store.publish(checkpoint, message="first", tag="v1")
    api = HfApi(endpoint=hub.endpoint)
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    listed = {file.path: file.size for file in api.list_repo_tree(REPO) if file.path in sizes}  # type: ignore[union-attr]
    assert listed == sizes
    (config,) = api.get_paths_info(REPO, ["config.json"], revision="v1")
    assert config.size == sizes["config.json"]  # type: ignore[union-attr]


def test_a_server_cannot_make_the_client_write_outside_the_cache(
    hub: FakeHub, store: HubStore, checkpoint: Path, facts: dict[str, FileFacts], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store.publish(checkpoint, message="first")
    before = set(tmp_path.iterdir())
    for commit in ("../../../outside", "/outside", "main", ""):
        monkeypatch.setattr(Commit, "id", commit)
        with pytest.raises(StoreError, match="not a commit"):
            store.fetch("resnet20.mnist", facts)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "location", ["hf://", "hf://zoo/resnet20", "hf://../zoo", "hf://zoo@", "hf://zoo@../x", "https://127.0.0.1/zoo", "s3://zoo"]
)  # fmt: skip
def test_invalid_locations(location: str) -> None:
    with pytest.raises(StoreError, match=r"is not a store: give a directory, hf://ORG or hf://ORG@REVISION"):
        open_store(location)
    with pytest.raises(StoreError, match="is not a store"):
        open_store(Path(location))


def test_hub_locations(hub: FakeHub, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "own_copy"))
    assert open_store("hf://zoo").publish(checkpoint, message="first", tag="v1").commit
    pinned = open_store("hf://zoo@v1")
    assert pinned.location == "hf://zoo@v1"
    assert pinned.fetch("resnet20.mnist", facts_in(checkpoint)).is_relative_to(tmp_path / "own_copy")
    with pytest.raises(StoreError, match="is one revision, for reading: publish to hf://zoo"):
        pinned.publish(checkpoint, message="second")
    assert open_store(tmp_path / "here").location == str(tmp_path / "here")


HUB = Path(__file__).resolve().parents[2] / "hub"


@pytest.mark.parametrize("name", ["resnet20.cifar10", "quant_cnv_w4a4.cifar10"])
def test_checkpoints_of_this_repository_are_unchanged_after_upload_and_download(
    hub: FakeHub, store: HubStore, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.publish(HUB / name, message="first")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    here, there = (create_model(name, pretrained=True, hub=place) for place in (HUB, "hf://zoo"))
    for (key, own_copy), (other, theirs) in zip(here.state_dict().items(), there.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(own_copy, theirs), key
    assert hub.requests["storage_get"] == 1
