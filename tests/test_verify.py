"""Verification: an unchanged checkpoint passes, and any difference is found and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness.publish
import pytest
import torch

import cnvzoo
from cnvzoo.checkpoints import index
from cnvzoo.checkpoints.folder import preprocessing_from
from cnvzoo.checkpoints.index import read_index
from cnvzoo.data import load_dataset
from cnvzoo.models.cnv import CNV
from cnvzoo.training.device import describe_device

ROOT = Path(__file__).resolve().parents[1]
HERE = {"device": describe_device(torch.device("cpu")), "versions": {"torch": str(torch.__version__)}}
ELSEWHERE: dict[str, Any] = {"device": {"kind": "cuda", "name": "Another"}, "versions": {"torch": "2.11.0"}}


@pytest.fixture
def published(tmp_path, make_checkpoint, small_datasets) -> Callable[..., Path]:
    """`published(off_by, **facts)`: folder of a checkpoint whose published number is `off_by` images wrong."""
    small_datasets(test=60)

    def make(off_by: int = 0, **facts: Any) -> Path:
        folder = make_checkpoint(tmp_path / "hub", "quant_cnv", "mnist", w_bits=2, a_bits=2)
        model, config = cnvzoo.load_checkpoint(folder)
        data, preprocessing = load_dataset("mnist"), preprocessing_from(config)
        score = cnvzoo.evaluate(model, data, preprocessing=preprocessing, device="cpu")
        correct = score.correct + off_by if score.correct + off_by <= 60 else score.correct - off_by
        values = json.loads((folder / "config.json").read_text())
        values |= {"correct": correct, "total": 60, **HERE, **facts}
        values["results"][0] |= {"correct": correct, "total": values["total"]}
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "README.md").write_text("# A model card\n")
        harness.publish.update_index(index.INDEX, folder.parent)
        return folder

    return make


def verify(folder: Path, *names: str) -> list[Any]:
    return cnvzoo.verify(names or None, hub=folder.parent, device="cpu")


def test_an_unchanged_checkpoint_passes(published) -> None:
    folder = published()
    (result,) = verify(folder)
    assert result.problem is None
    assert result.name == folder.name
    assert result.published == result.found
    assert (result.total, result.allowed) == (60, 0)
    for alone in (folder, str(folder)):
        (by_path,) = cnvzoo.verify(alone, device="cpu")
        assert (by_path.problem, by_path.found) == (None, result.found)


def test_a_difference_of_one_image_fails_on_the_same_kind_of_machine(published) -> None:
    (result,) = verify(published(off_by=1))
    assert abs(result.published - result.found) == 1
    assert f"{result.found} correct images, published {result.published}, allowed difference 0" in result.problem


@pytest.mark.parametrize(
    ("facts", "off_by", "fine"),
    [
        (ELSEWHERE, 5, True),
        (ELSEWHERE, 6, False),
        ({"versions": {"torch": "2.11.0"}}, 5, True),
        ({"device": {**HERE["device"], "capability": "AVX9"}}, 5, True),
        ({"device": {**HERE["device"], "name": "Another"}}, 5, True),
    ],
)
def test_a_difference_of_five_images_passes_on_another_kind_of_machine(
    published, facts: dict[str, Any], off_by: int, fine: bool
) -> None:
    (result,) = verify(published(off_by, **facts))
    assert result.allowed == 5
    assert (result.problem is None) == fine


def test_the_number_of_threads_does_not_make_another_kind_of_machine(published) -> None:
    (result,) = verify(published(device={**HERE["device"], "threads": 777, "fake_quantization": "eager"}))
    assert result.allowed == 0


def test_another_test_set(published) -> None:
    (result,) = verify(published(total=61))
    assert "published on 61 images, and the test set has 60" in result.problem


@pytest.mark.parametrize("image_size", [30, 28])
def test_preprocessing_of_other_images_than_the_test_set_has(published, image_size: int) -> None:
    preprocessing = {"size": 32, "mean": [0.0], "std": [1.0], "image_size": image_size}
    (result,) = verify(published(preprocessing=preprocessing))
    said = "its config is for images of 30x30 pixels, 1 channel(s) and 10 classes, and mnist has images of 28x28 pixels"
    assert (result.problem is None) == (image_size == 28)
    assert result.problem is None or said in result.problem


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_a_changed_file_of_any_name_fails(published, name: str) -> None:
    folder = published()
    path = folder / name
    content = path.read_bytes()
    for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1], content + b"\n"):
        path.write_bytes(damaged)
        (result,) = verify(folder)
        assert str(path) in result.problem
        assert result.found is None
    path.unlink()
    assert name in verify(folder)[0].problem


def test_by_its_path_a_checkpoint_is_compared_with_its_own_config(published) -> None:
    folder = published()
    (folder / "README.md").write_text("another")
    by_name, by_path = (cnvzoo.verify(c, hub=folder.parent, device="cpu")[0].problem for c in (folder.name, folder))
    assert str(folder / "README.md") in (by_name or "")
    assert by_path is None
    assert "is compared with its own config.json instead of the" in str(cnvzoo.verify.__doc__)
    (folder / "model.safetensors").write_bytes(b"")
    assert str(folder / "model.safetensors") in (cnvzoo.verify(folder, device="cpu")[0].problem or "")


@pytest.mark.parametrize("file", ["README.md", "config.json", "model.safetensors"])
def test_one_flipped_bit_in_any_published_file_is_found(tmp_path: Path, file: str) -> None:
    hub, rng = tmp_path / "hub", random.Random(0)
    names = list(read_index().checkpoints)[::4]
    for name in names:
        shutil.copytree(ROOT / "hub" / name, hub / name)
    assert all(read_index().checkpoints[name].files.keys() >= {file} for name in names)
    for name in names:
        content = bytearray((hub / name / file).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (hub / name / file).write_bytes(content)
    for name, result in zip(names, cnvzoo.verify(names, hub=hub, device="cpu"), strict=True):
        assert result.problem is not None
        assert str(hub / name / file) in result.problem


def test_after_a_failure_the_other_checkpoints_are_verified(published) -> None:
    folder = published()
    (folder.parent / "empty").mkdir()
    results = verify(folder, str(folder.parent / "empty"), folder.name)
    assert [result.problem is None for result in results] == [False, True]
    assert "is " in results[0].problem


def test_an_error_of_a_model_is_its_problem(published, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be the user's own, and fail on these images."""
    folder = published()
    (passed,) = verify(folder)

    def fail(*_: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(CNV, "forward_features", fail)
    (result,) = verify(folder)
    assert result.problem.startswith("evaluating it failed: RuntimeError: no such kernel (test_verify.py, line ")
    assert (result.published, result.found, result.total) == (passed.published, None, 60)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cnv.nothing", "no checkpoint 'cnv.nothing'.*Choices: quant_cnv_w2a2.mnist"),
        ("../nothing", "../nothing: no such folder"),
    ],
)
def test_a_missing_checkpoint_is_an_error_before_any_is_verified(published, name: str, says: str) -> None:
    folder = published()
    with pytest.raises(cnvzoo.CheckpointError, match=says):
        verify(folder, folder.name, name)


def test_a_published_checkpoint(real_data) -> None:
    (result,) = cnvzoo.verify(["resnet20.mnist"], hub=ROOT / "hub", data_root=real_data("mnist"))
    assert result.problem is None
    assert result.found is not None
    assert result.found > 9900
