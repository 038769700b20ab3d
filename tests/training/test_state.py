"""State files: one flipped bit is found before it reaches the weights."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from synthetic import StepHook, interrupted, recipe, run

from cnvzoo.training import RunError, RunInterrupted, RunRecord
from cnvzoo.training.state import load_checked, save_checked

TAUGHT: dict[str, Any] = {
    "teacher": "mnist_resnet14",
    "epochs": 3,
    "augmentation": {"crop_padding": 2, "flip": True},
    "distillation": {"views": 2},
}


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def places(content: bytes) -> dict[str, int]:
    """Offsets of bytes to damage, by the part of the file that they belong to."""
    header = header_size(content)
    return {
        "size of the header": 0,
        "name of a tensor": content.index(b"fc.weight") + 3,
        "type of a tensor": content.index(b'"F32"') + 2,
        "number in the values": content.index(b'\\"step\\": ') + len(b'\\"step\\": '),
        "identity": content.index(b'\\"holdout\\": ') + len(b'\\"holdout\\": '),
        "conditions": content.index(b'\\"name\\": \\"') + len(b'\\"name\\": \\"'),
        "checksum": content.index(b'"sha256":"') + len(b'"sha256":"'),
        "first tensor": header,
        "middle of the tensors": (header + len(content)) // 2,
        "last byte": len(content) - 1,
    }


def test_a_state_with_a_flipped_bit_is_refused(tmp_path: Path, each_step: StepHook) -> None:
    state = interrupted(recipe(), tmp_path, each_step)
    whole = state.read_bytes()
    for place in places(whole).values():
        state.write_bytes(flipped(whole, place))
        with pytest.raises((SafetensorError, ValueError)):
            load_checked(state)
    for what in ("name of a tensor", "identity", "middle of the tensors"):
        damaged = flipped(whole, places(whole)[what])
        state.write_bytes(damaged)
        with pytest.raises(RunError, match="delete it to start over") as caught:
            run(recipe(), tmp_path)
        assert str(caught.value).startswith(f"{state}: "), what
        assert "\n" not in str(caught.value), what
        assert [path.name for path in tmp_path.glob("*.safetensors")] == [state.name], what
        assert state.read_bytes() == damaged, what
    state.write_bytes(whole)
    assert len(run(recipe(), tmp_path).history) == 2


def test_a_state_without_a_checksum_is_refused_with_the_reason(tmp_path: Path, each_step: StepHook) -> None:
    state = interrupted(recipe(), tmp_path, each_step)
    size = header_size(state.read_bytes())
    metadata = json.loads(state.read_bytes()[8:size])["__metadata__"]
    del metadata["sha256"]
    save_file(load_file(state), state, metadata)
    with pytest.raises(RunError, match="it has no checksum, as older versions of cnvzoo saved it") as caught:
        run(recipe(), tmp_path)
    assert "delete it to start over" in str(caught.value)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run(recipe(name="mnist_resnet14", model="resnet14"), folder, epochs=1)
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def taught(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return run(recipe(**TAUGHT), tmp_path_factory.mktemp("taught"), teacher=teacher)


@pytest.mark.parametrize("what", ["logits", "metadata", "header"])
def test_precomputed_logits_that_are_damaged_are_computed_again(
    what: str, teacher: Path, taught: RunRecord, tmp_path: Path
) -> None:
    asked = iter(range(10))
    with pytest.raises(RunInterrupted):  # between the two views
        run(recipe(**TAUGHT), tmp_path, teacher=teacher, stop=lambda: "enough" if next(asked) else None)
    logits = tmp_path / "teacher_logits.safetensors"
    content = logits.read_bytes()
    place = {
        "logits": len(content) - 1,
        "metadata": content.index(b'"seconds":"') + len(b'"seconds":"'),
        "header": content.index(b"F16"),
    }[what]
    logits.write_bytes(flipped(content, place, bit=6 if what == "logits" else 0))
    assert run(recipe(**TAUGHT), tmp_path, teacher=teacher).weights_sha256 == taught.weights_sha256


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_of_every_kind_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "checked.safetensors"
    tensors = {
        "scalar": torch.tensor(-0.0),
        "counter": torch.tensor(7),
        "none": torch.empty(0, 3),
        "half": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "mask": torch.tensor([True, False]),
        "odd": torch.tensor([float("nan"), float("inf")]),
    }
    facts = {"values": {"a": [1, None, "ü"]}, "seconds": 0.1}
    save_checked(tensors, path, facts)
    found, said = load_checked(path)
    assert said == facts
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


def test_a_file_that_is_replaced_again_and_again_is_read_as_one_of_its_versions(tmp_path: Path) -> None:
    """A state is copied off a node, or watched, while its run goes on to replace it."""
    path, read = tmp_path / "checked.safetensors", threading.Event()

    def save(version: int) -> None:
        save_checked({"a": torch.full((1000,), version)}, path, {"version": version})

    def replace() -> None:
        for version in itertools.count(1):
            save(version)
            if read.is_set():
                return

    save(0)
    replacing = threading.Thread(target=replace)
    replacing.start()
    try:
        versions = []
        for _ in range(200):
            tensors, facts = load_checked(path)
            assert tensors["a"].tolist() == [facts["version"]] * 1000
            versions.append(facts["version"])
    finally:
        read.set()
        replacing.join()
    assert versions[-1] > versions[0]


Change = Callable[[dict[str, torch.Tensor], dict[str, str]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.update(a=tensors["b"], b=tensors["a"]),
        lambda tensors, _: tensors.update(a=tensors["a"].view(2, 1)),
        lambda tensors, _: tensors.update(a=tensors["a"].view(torch.int32)),
        lambda tensors, _: tensors.pop("b"),
        lambda tensors, _: tensors.update(c=tensors["a"].clone()),
        lambda _, metadata: metadata.update(step="2"),
        lambda _, metadata: metadata.pop("step"),
        lambda _, metadata: metadata.update(more="1"),
    ],
    ids=["swapped", "shape", "dtype", "left out", "added", "value", "value left out", "value added"],
)
def test_a_file_of_other_tensors_or_values_under_the_same_checksum_is_refused(change: Change, tmp_path: Path) -> None:
    """The checksum covers names, types and shapes, not only bytes."""
    path = tmp_path / "checked.safetensors"
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    save_checked(tensors, path, {"step": 1})
    size = header_size(path.read_bytes())
    metadata = json.loads(path.read_bytes()[8:size])["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="damaged"):
        load_checked(path)
