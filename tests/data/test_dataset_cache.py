"""The dataset cache under damage, without a network, with other processes and interruptions, on twelve images."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision.datasets
from safetensors.torch import load_file, save_file

from cnvzoo.data import DatasetError, load_dataset, published


class Downloader:
    """Replaces torchvision's MNIST: twelve training and four test images, and a download that can be made to fail."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.images = {n: torch.randint(256, (n, 28, 28), generator=g, dtype=torch.uint8) for n in (12, 4)}
        self.labels = {n: torch.arange(n) % 10 for n in (12, 4)}
        self.calls = 0
        self.online = True
        self.delay = 0.0

    def __call__(self, root: str, train: bool, download: bool) -> Downloader:
        assert download
        self.calls += 1
        time.sleep(self.delay)
        if not self.online:
            raise URLError("no route to host")
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / "raw").write_bytes(b"left by the download")
        n = 12 if train else 4
        self.data, self.targets = self.images[n], self.labels[n]
        return self


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Downloader:
    downloader = Downloader()
    checksums = {}
    for split, n in (("train", 12), ("test", 4)):
        arrays = {"images": downloader.images[n].unsqueeze(-1), "labels": downloader.labels[n].to(torch.uint8)}
        for kind, array in arrays.items():
            digest = hashlib.sha256(array.numpy().tobytes()).hexdigest()
            checksums[f"{split}_{kind}"] = {"shape": list(array.shape), "dtype": "uint8", "sha256": digest}
    info = replace(published.dataset_info("mnist"), train_size=12, test_size=4)
    monkeypatch.setitem(published.CHECKSUMS, "mnist", checksums)
    monkeypatch.setattr(published, "DATASETS", {**published.DATASETS, "mnist": info})
    monkeypatch.setattr(torchvision.datasets, "MNIST", downloader)
    return downloader


def files(root: Path) -> set[str]:
    return {p.name for p in root.iterdir() if not p.name.endswith(".lock")}


def test_the_first_load_downloads_and_later_ones_read(network: Downloader, tmp_path: Path) -> None:
    first = load_dataset("mnist", root=tmp_path / "new")
    assert network.calls == 2
    assert files(tmp_path / "new") == {"mnist.safetensors"}
    network.online = False
    again = load_dataset("mnist", root=tmp_path / "new")
    for dataset in (first, again):
        assert torch.equal(dataset.train_images, network.images[12].unsqueeze(-1))
        assert torch.equal(dataset.test_labels, torch.tensor([0, 1, 2, 3], dtype=torch.uint8))


def test_root_comes_from_the_environment(network: Downloader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNVZOO_DATA", str(tmp_path / "env"))
    load_dataset("mnist")
    assert files(tmp_path / "env") == {"mnist.safetensors"}
    load_dataset("mnist", root=tmp_path / "argument")
    assert files(tmp_path / "argument") == {"mnist.safetensors"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def lose_an_array(path: Path) -> None:
    arrays = load_file(path)
    save_file({k: v.clone() for k, v in arrays.items() if k != "test_labels"}, path)


def reshape_an_array(path: Path) -> None:
    arrays = {k: v.clone() for k, v in load_file(path).items()}
    arrays["train_images"] = arrays["train_images"].squeeze(-1)
    save_file(arrays, path)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncate, "not a complete safetensors file"),
        (empty, "not a complete safetensors file"),
        (flip_a_bit, "sha256 of"),
        (lose_an_array, "no array 'test_labels'"),
        (reshape_an_array, r"train_images is torch.uint8 \[12, 28, 28\], expected"),
    ],
)
def test_a_damaged_file_is_renamed_and_downloaded_again(
    network: Downloader, tmp_path: Path, damage: Callable[[Path], None], word: str
) -> None:
    load_dataset("mnist", root=tmp_path)
    damage(tmp_path / "mnist.safetensors")
    damaged = (tmp_path / "mnist.safetensors").read_bytes()
    with pytest.warns(UserWarning, match=word):
        dataset = load_dataset("mnist", root=tmp_path)
    assert torch.equal(dataset.train_images, network.images[12].unsqueeze(-1))
    assert (tmp_path / "mnist.safetensors.corrupt").read_bytes() == damaged
    network.online = False
    load_dataset("mnist", root=tmp_path)


@pytest.mark.filterwarnings("ignore:mnist")
def test_a_damaged_file_without_network_is_explained(network: Downloader, tmp_path: Path) -> None:
    load_dataset("mnist", root=tmp_path)
    flip_a_bit(tmp_path / "mnist.safetensors")
    network.online = False
    with pytest.raises(DatasetError, match="sha256 of") as caught:
        load_dataset("mnist", root=tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "mnist.safetensors") in message
    for part in ("mnist.safetensors.corrupt", "no route to host", "CNVZOO_DATA", "Try again"):
        assert part in message
    assert files(tmp_path) == {"mnist.safetensors.corrupt"}


def test_no_cache_and_no_network(network: Downloader, tmp_path: Path) -> None:
    network.online = False
    with pytest.raises(
        DatasetError, match=r"is not in the dataset cache, and downloading it failed: .*no route to host"
    ):
        load_dataset("mnist", root=tmp_path)
    assert files(tmp_path) == set()


def test_a_message_of_torchvision_is_quoted_in_one_line(
    network: Downloader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("Error downloading a.gz:\nTried https://a/, got:\n\t404\n")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    with pytest.raises(DatasetError) as error:
        load_dataset("mnist", root=tmp_path)
    path = tmp_path / "mnist.safetensors"
    assert str(error.value).startswith(
        f"mnist: {path} is not in the dataset cache, and downloading it failed: torchvision's download raised "
        "RuntimeError: Error downloading a.gz: Tried https://a/, got: 404. Try again"
    )
    assert "\n" not in str(error.value)


def test_other_data_from_the_downloader_is_refused(network: Downloader, tmp_path: Path) -> None:
    network.images[4][0, 0, 0] ^= 1
    with pytest.raises(DatasetError, match="other data than the published set: sha256 of test_images"):
        load_dataset("mnist", root=tmp_path)
    assert files(tmp_path) == set()


def test_interrupted_write_leaves_nothing(network: Downloader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_dataset("mnist", root=tmp_path)
    assert files(tmp_path) == set()


def test_a_file_with_further_arrays_is_accepted(network: Downloader, tmp_path: Path) -> None:
    load_dataset("mnist", root=tmp_path)
    path = tmp_path / "mnist.safetensors"
    save_file({k: v.clone() for k, v in load_file(path).items()} | {"notes": torch.zeros(1)}, path)
    assert torch.equal(load_dataset("mnist", root=tmp_path).train_images, network.images[12].unsqueeze(-1))
    assert network.calls == 2


def test_files_of_a_killed_download_are_removed(network: Downloader, tmp_path: Path) -> None:
    (tmp_path / ".mnist.fetch" / "download").mkdir(parents=True)
    (tmp_path / ".mnist.fetch" / "mnist.safetensors").write_bytes(b"half")
    load_dataset("mnist", root=tmp_path)
    assert files(tmp_path) == {"mnist.safetensors"}


def test_concurrent_first_loads_download_once(network: Downloader, tmp_path: Path) -> None:
    network.delay = 0.05
    results: list[bool] = []

    def work() -> None:
        dataset = load_dataset("mnist", root=tmp_path)
        results.append(torch.equal(dataset.train_images, network.images[12].unsqueeze(-1)))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 5
    assert network.calls == 2  # the training and the test set, once


def test_a_root_that_cannot_be_created(network: Downloader, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match=r"cannot be written to the dataset cache .*file"):
        load_dataset("mnist", root=tmp_path / "file" / "root")
