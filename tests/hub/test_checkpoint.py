"""Checkpoints: what was written is what is read, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cnvzoo
from cnvzoo.files import sha256_of
from cnvzoo.hub import (
    CheckpointConfig,
    CheckpointError,
    load_checkpoint,
    preprocessing_from,
    read_config,
    write_checkpoint,
)
from cnvzoo.models import build_model

FLOAT = {"name": "resnet20", "num_classes": 10, "in_chans": 1}
QUANTIZED = {"name": "quant_cnv", "num_classes": 7, "in_chans": 3, "w_bits": 2, "a_bits": 3, "first_w_bits": 4}


def images(in_chans: int) -> Tensor:
    return torch.randint(256, (4, in_chans, 32, 32), generator=torch.Generator().manual_seed(1)) / 255


def written(folder: Path, arguments: dict[str, Any], changed: dict[str, Tensor | None] | None = None) -> nn.Module:
    """Write a checkpoint of a fresh model, some of its tensors changed or (None) left out; returns the model."""
    torch.manual_seed(0)
    model = build_model(**arguments).eval()
    tensors = {**model.state_dict(), **(changed or {})}
    folder.parent.mkdir(exist_ok=True)
    weights = folder.parent / "run.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, weights)
    write_checkpoint(folder, config_of(arguments, sha256_of(weights)), weights)
    weights.unlink()
    return model


def config_of(arguments: dict[str, Any], weights_sha256: str) -> CheckpointConfig:
    channels = arguments["in_chans"]
    return CheckpointConfig(
        name=f"{arguments['name']}.shapes",
        model=arguments,
        dataset="shapes",
        classes=[f"shape {i}" for i in range(arguments["num_classes"])],
        preprocessing={"size": 32, "mean": [0.5] * channels, "std": [0.25] * channels, "image_size": 28},
        correct=9123,
        total=10_000,
        weights_sha256=weights_sha256,
        recipe={"name": "shapes_recipe", "epochs": 3, "seed": 0},
        versions={"torch": "2.11.0"},
        device={"kind": "cpu", "threads": 2},
        commit=None,
    )


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("arguments", [FLOAT, QUANTIZED], ids=["float", "quantized"])
def test_round_trip(tmp_path: Path, arguments: dict[str, Any]) -> None:
    folder = tmp_path / "hub" / "tag.shapes"
    model = written(folder, arguments)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    torch.manual_seed(99)
    loaded, config = cnvzoo.load_checkpoint(folder)
    assert not loaded.training
    with torch.no_grad():
        logits = model(images(arguments["in_chans"]))
        assert torch.equal(loaded(images(arguments["in_chans"])), logits)
    assert logits.std() > 0
    assert config == config_of(arguments, sha256_of(folder / "model.safetensors"))
    assert config.accuracy == 91.23
    preprocessing = preprocessing_from(config)
    assert (preprocessing.size, preprocessing.native_size, preprocessing.in_chans) == (32, 28, arguments["in_chans"])
    assert set(preprocessing.mean) == {0.5}


def test_config_is_json_that_people_can_read(tmp_path: Path) -> None:
    written(tmp_path / "c", QUANTIZED)
    text = (tmp_path / "c" / "config.json").read_text()
    assert json.loads(text)["model"] == QUANTIZED
    assert len(text.splitlines()) > 20


@pytest.mark.parametrize("where", [10, -1, -1000])
def test_a_flipped_bit_is_refused(tmp_path: Path, where: int) -> None:
    written(tmp_path / "c", FLOAT)
    path = tmp_path / "c" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    message = refusal(tmp_path / "c")
    assert str(path) in message
    assert "sha256" in message
    assert "damaged" in message


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "c", FLOAT)
    path = tmp_path / "c" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert str(path) in refusal(tmp_path / "c")


def test_missing_files_are_named(tmp_path: Path) -> None:
    written(tmp_path / "c", FLOAT)
    (tmp_path / "c" / "model.safetensors").unlink()
    assert str(tmp_path / "c" / "model.safetensors") in refusal(tmp_path / "c")
    (tmp_path / "c" / "config.json").unlink()
    message = refusal(tmp_path / "c")
    assert str(tmp_path / "c" / "config.json") in message
    assert "checkpoint folder" in message
    assert "no-such" in refusal(tmp_path / "no-such")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"total": 0}, "total"),
        ({"correct": -1}, "correct"),
        ({"weights_sha256": "abc"}, "weights_sha256"),
        ({"classes": None}, "classes"),
        ({"acuracy": 99.0}, "acuracy"),
    ],
)
def test_invalid_config_names_file_and_key(tmp_path: Path, change: dict[str, Any], names: str) -> None:
    written(tmp_path / "c", FLOAT)
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path / "c")
    assert str(path) in str(caught.value)
    assert names in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_config_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    written(tmp_path / "c", FLOAT)
    (tmp_path / "c" / "config.json").write_bytes(content)
    assert str(tmp_path / "c" / "config.json") in refusal(tmp_path / "c")


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"extra.weight": torch.zeros(3)}, "extra.weight"),
        ({"norm.bias": None}, "norm.bias"),
        ({"fc.weight": torch.zeros(11, 64)}, "fc.weight"),
    ],
    ids=["extra", "missing", "mis-shaped"],
)
def test_other_tensors_than_the_models_are_named(tmp_path: Path, changed: dict[str, Tensor | None], names: str) -> None:
    written(tmp_path / "c", FLOAT, changed)
    message = refusal(tmp_path / "c")
    assert str(tmp_path / "c" / "model.safetensors") in message
    assert names in message


def test_a_scale_that_is_missing_is_named(tmp_path: Path) -> None:
    """Brevitas can be told to overlook missing keys: not here."""
    torch.manual_seed(0)
    (scale, *_) = (n for n in build_model(**QUANTIZED).state_dict() if n.endswith(".scale"))
    written(tmp_path / "c", QUANTIZED, {scale: None})
    assert scale in refusal(tmp_path / "c")


def test_weights_that_are_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\x80\x04 not safetensors")
    write_checkpoint(tmp_path / "c", config_of(FLOAT, sha256_of(tmp_path / "weights")), tmp_path / "weights")
    assert str(tmp_path / "c" / "model.safetensors") in refusal(tmp_path / "c")


def test_writing_refuses_other_weights_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    model = written(tmp_path / "c", FLOAT)
    files = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    save_file({"another": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        write_checkpoint(tmp_path / "c", config_of(FLOAT, "0" * 64), tmp_path / "other.safetensors")
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == files
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert all(torch.equal(stored[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"num_classes": 10}, "name"),
        ({**FLOAT, "num_classes": "ten"}, "cannot be built"),
        ({**FLOAT, "name": "resnet21"}, "unknown model 'resnet21': did you mean"),
        ({**FLOAT, "w_bits": 4}, "is a float model"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_naming_the_file(
    tmp_path: Path, model: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "c"
    written(folder, FLOAT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model": model}))
    assert said in refusal(folder)
    assert str(folder / "config.json") in refusal(folder)
