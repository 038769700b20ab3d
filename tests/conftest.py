"""Fixtures for all tests: the real datasets if they are available, small ones to replace them, and checkpoints."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# Before torch reads it. Batches this small are slower on several threads, which spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import save_file

import cnvzoo
import cnvzoo.checkpoints.index
from cnvzoo.checkpoints.folder import write_checkpoint
from cnvzoo.checkpoints.format import CheckpointFacts, SeedResult
from cnvzoo.data import dataset_info, published
from cnvzoo.files import sha256_of
from cnvzoo.models import fake_quant, quant
from cnvzoo.training import preprocessing_of

# dev.py, reproduce.py and its harness are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# the simulated Hub of tests/checkpoints serves other tests too
sys.path.insert(0, str(Path(__file__).resolve().parent / "checkpoints"))

import harness.publish

import dev

_LARGE = 1 << 14  # weights of a layer


@pytest.fixture(scope="module", autouse=True)
def _freeze_imported_objects() -> None:
    """Exclude imported objects from garbage collections: every run ends with one, which would take 0.3 s otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _remember_fitted_scales() -> Iterator[None]:
    """Fit scales to the same weights once: many tests quantize the same models, which takes seconds for each."""
    fitted: dict[tuple[object, ...], torch.Tensor] = {}

    def fit(x: torch.Tensor, ints: fake_quant.IntRange, steps: int = 20) -> torch.Tensor:
        if x.numel() < _LARGE or x.device.type != "cpu":
            return fake_quant.least_squares_scale(x, ints, steps)
        values = x.detach().contiguous()
        content = hashlib.blake2b(values.view(-1).view(torch.uint8).numpy().data).digest()
        key = (ints, steps, x.dtype, x.shape, torch.get_num_threads(), content)
        if key not in fitted:
            fitted[key] = fake_quant.least_squares_scale(x, ints, steps)
        return fitted[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "least_squares_scale", fit)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that compile loops first: a worker process that gets the last of them would compile the same ones again."""
    items.sort(key=lambda item: item.path.parent.name not in ("models", "training"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch finds none here")


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data(name)` is the folder that holds a real dataset; without one the test is skipped, in words.

    A cache that does not hold the dataset is filled from a folder shared/datasets beside the checkout.
    """

    def find(name: str) -> Path:
        if problem := dev.fill_dataset(name, sys.executable):
            pytest.skip(problem)
        return published.default_root()

    return find


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile no loops, here and in child processes: compiling takes longer than tiny runs do."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture
def small_datasets(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`small_datasets(train=, test=)`: replace all datasets by ones with so many images, of noise over a pattern."""

    def use(*, train: int = 300, test: int = 50) -> None:
        small = {name: replace(info, train_size=train, test_size=test) for name, info in published.DATASETS.items()}
        monkeypatch.setattr(published, "DATASETS", small)
        monkeypatch.setattr(published, "load_arrays", lambda name, root: _arrays(name))

    return use


def _arrays(name: str) -> dict[str, torch.Tensor]:
    info = dataset_info(name)
    generator = torch.Generator().manual_seed(0)
    side = info.image_size
    tiles = torch.randint(2, (info.num_classes, 4, 4, info.in_chans), generator=generator, dtype=torch.uint8) * 156
    patterns = tiles.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
    arrays = {}
    for split, count in (("train", info.train_size), ("test", info.test_size)):
        labels = torch.arange(count) % info.num_classes
        shape = (count, side, side, info.in_chans)
        noise = torch.randint(100, shape, generator=generator, dtype=torch.uint8)
        arrays[f"{split}_images"] = patterns[labels] + noise
        arrays[f"{split}_labels"] = labels.to(torch.uint8)
    return arrays


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`untrained(model, dataset, ...)`: a checkpoint for `make_checkpoint` to copy, made once for all tests."""
    made: dict[Any, Path] = {}

    def give(model: str, dataset: str, scored: bool, bits: dict[str, int]) -> Path:
        key = (model, dataset_info(dataset), scored, *sorted(bits.items()))
        if key not in made:
            made[key] = _write_untrained(tmp_path_factory.mktemp("untrained"), model, dataset, scored, bits)
        return made[key]

    return give


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(n):` no file that is written can grow past `n` bytes."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def make_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: Callable[..., Path]
) -> Callable[..., Path]:
    """`make_checkpoint(hub, model, dataset, w_bits=, a_bits=)`: a checkpoint of untrained weights; its folder.

    Its number is made up, unless `scored`. What is in `hub` then is all that is published: the index of the package
    says so for the time of the test.
    """

    def make(hub: Path, model: str, dataset: str, *, scored: bool = False, **bits: int) -> Path:
        checkpoint = untrained(model, dataset, scored, bits)
        folder = shutil.copytree(checkpoint, hub / checkpoint.name)
        monkeypatch.setattr(cnvzoo.checkpoints.index, "INDEX", tmp_path / "index.json")
        harness.publish.update_index(tmp_path / "index.json", hub)
        return folder

    return make


def _write_untrained(place: Path, model: str, dataset: str, scored: bool, bits: dict[str, int]) -> Path:
    info = dataset_info(dataset)
    arguments: dict[str, Any] = {"num_classes": info.num_classes, "in_chans": info.in_chans, **bits}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = cnvzoo.create_model(model, **arguments)
    state = built.state_dict()
    score = cnvzoo.evaluate(built, dataset, device="cpu") if scored else None
    counts: dict[str, Any] = {
        "seed": 0,
        "correct": score.correct if score else 5,
        "total": score.total if score else 50,
    }
    weights = place / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    tag = f"{model}_w{bits['w_bits']}a{bits['a_bits']}" if bits else model
    sha256 = sha256_of(weights)
    facts = CheckpointFacts(
        name=f"{tag}.{dataset}", model={"name": model, **arguments}, dataset=dataset, classes=list(info.classes),
        preprocessing=preprocessing_of(model, dataset).to_dict(),
        **counts, results=[SeedResult(**counts, weights_sha256=sha256)], weights_sha256=sha256,
        recipe={}, versions={}, device={}, commit=None,
    )  # fmt: skip
    write_checkpoint(place / facts.name, facts, weights)
    return place / facts.name
