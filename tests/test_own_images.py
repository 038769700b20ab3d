"""From own images through fine-tuning to a file that runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import cnvzoo
from cnvzoo.cli.app import app
from cnvzoo.data import Dataset
from cnvzoo.training import RunError, recipe_from_dict, run_recipe

COLOURS = {"blue": (20, 40, 220), "green": (20, 200, 40), "red": (220, 30, 30)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Noisy images of three colours, 24 for training and 6 for testing of each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = np.clip(generator.normal(colour, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return tmp_path / "photos"


def recipe_text(**changes: Any) -> dict[str, Any]:
    values = {
        "name": "photos_quant_cnv_w2a2", "model": "quant_cnv", "w_bits": 2, "a_bits": 2, "dataset": "./photos",
        "epochs": 4, "batch_size": 12, "optimizer": {"lr": 0.02},
        "schedule": {"warmup_epochs": 0.5}, "start": "quant_cnv_w2a2.cifar10",
    }  # fmt: skip
    return values | changes


def test_from_own_images_to_a_file_that_runs(photos: Path, tmp_path: Path, uncompiled: None) -> None:
    recipe = recipe_from_dict(recipe_text(dataset=str(photos), epochs=6), "test")
    result = cnvzoo.train(recipe, run_dir=tmp_path / "run", device="cpu", quiet=True)
    assert result.model.classes == ("blue", "green", "red")
    assert result.record.accuracy > 90
    assert result.record.start == {
        "checkpoint": "quant_cnv_w2a2.cifar10",
        "weights_sha256": cnvzoo.load_checkpoint("quant_cnv_w2a2.cifar10")[1].file.sha256,
    }

    config = cnvzoo.save_checkpoint(result, tmp_path / "colours")
    assert (config.name, config.dataset, config.classes) == ("colours", "photos", ["blue", "green", "red"])
    assert (config.correct, config.total) == (result.record.correct, 18)
    card = (tmp_path / "colours" / "README.md").read_text()
    assert "trained on photos with cnvzoo" in card
    assert "blue, green, red" in card
    assert "cifar" not in card.split("## Recipe")[0].lower()

    loaded = cnvzoo.create_model(tmp_path / "colours", pretrained=True)
    image = Image.open(photos / "test" / "red" / "0.png")
    (guess,) = cnvzoo.predict(loaded, image, top=1)
    assert (guess.label, guess.index) == ("red", 2)
    assert cnvzoo.evaluate(loaded, photos, device="cpu").correct == result.record.correct
    (verified,) = cnvzoo.verify([tmp_path / "colours"], dataset=photos, device="cpu")
    assert (verified.problem, verified.found, verified.published) == (
        None,
        result.record.correct,
        result.record.correct,
    )
    assert cnvzoo.verify([tmp_path / "colours"], device="cpu")[0].problem is None  # its files alone
    assert cnvzoo.publish(tmp_path / "colours", tmp_path / "store")[0].new

    cnvzoo.export(tmp_path / "colours", tmp_path / "colours.onnx")
    code = (
        "import json, sys; import cnvzoo_runtime; model = cnvzoo_runtime.load(sys.argv[1]); "
        "images = [cnvzoo_runtime.read_image(path) for path in sys.argv[2:]]; "
        "print(json.dumps([found[0].label for found in model.predict(images, top=1)])); "
        "assert 'torch' not in sys.modules"
    )
    files = sorted((photos / "test").glob("*/*.png"))
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "colours.onnx", *files], capture_output=True, text=True, check=True
    )
    labels = json.loads(done.stdout)
    assert labels == [found[0].label for found in cnvzoo.predict(loaded, [Image.open(file) for file in files], top=1)]
    assert sum(label == file.parent.name for label, file in zip(labels, files, strict=True)) == result.record.correct


def test_the_same_on_the_command_line(photos: Path, tmp_path: Path, uncompiled: None, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    (tmp_path / "colours.yaml").write_text(json.dumps({k: v for k, v in recipe_text(epochs=1).items() if k != "name"}))
    out = run("train", "colours.yaml", "--device", "cpu", "--checkpoint", "mine")
    assert "on the test set of photos" in out
    assert "checkpoint: mine" in out
    scored = out.split(" %")[0].split()[-1]
    assert f"mine: {scored} %" in run("eval", "./mine", "--dataset", "./photos", "--device", "cpu")
    run("export", "./mine", "-o", "mine.onnx")
    assert f"mine.onnx: {scored} %" in run("eval", "mine.onnx", "--dataset", "./photos")
    predicted = run("predict", "photos/test/red/0.png", "--checkpoint", "./mine", "--top", "3")
    assert set(COLOURS) <= set(predicted.replace(",", " ").split())


def test_own_images_decide_the_identity_of_a_run(photos: Path, tmp_path: Path, uncompiled: None) -> None:
    recipe = recipe_from_dict(recipe_text(dataset=str(photos), epochs=1, start=None), "test")
    record = cnvzoo.train(recipe, run_dir=tmp_path / "run", device="cpu", quiet=True).record
    moved = photos.rename(tmp_path / "elsewhere")
    same = cnvzoo.train(recipe, dataset=moved, run_dir=tmp_path / "run", device="cpu", quiet=True).record
    assert same.weights_sha256 == record.weights_sha256
    Image.new("RGB", (36, 40), (1, 2, 3)).save(moved / "train" / "red" / "0.png")
    with pytest.raises(RunError, match=r"holds the finished run of photos_quant_cnv_w2a2, .* differs in recipe"):
        cnvzoo.train(recipe, dataset=moved, run_dir=tmp_path / "run", device="cpu", quiet=True)


def test_a_start_of_another_model_is_refused(photos: Path) -> None:
    recipe = recipe_from_dict(recipe_text(dataset=str(photos), start="resnet20.cifar10"), "test")
    with pytest.raises(cnvzoo.ModelError, match="is a resnet20, and the recipe trains quant_cnv_w2a2"):
        cnvzoo.train(recipe, quiet=True)


def test_a_start_with_other_bits_in_the_first_layer_is_quantized_anew(
    photos: Path, tmp_path: Path, uncompiled: None
) -> None:
    model = cnvzoo.create_model("quant_resnet20", num_classes=3, w_bits=2, a_bits=2, first_w_bits=2)
    cnvzoo.save_checkpoint(model, tmp_path / "mine", preprocessing=cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3))
    changes = {"model": "quant_resnet20", "dataset": str(photos), "epochs": 1, "start": str(tmp_path / "mine")}
    recipe = recipe_from_dict(recipe_text(**changes), "test")
    result = cnvzoo.train(recipe, run_dir=tmp_path / "run", device="cpu", quiet=True)
    first = next(iter(cnvzoo.integer_weights(result.model).values()))
    assert (first.bits, first.values.abs().max().item()) == (8, 127)
    assert cnvzoo.evaluate(result.model, photos, device="cpu").correct == result.record.correct


def test_a_start_with_other_options_is_refused(photos: Path, tmp_path: Path) -> None:
    @cnvzoo.register_model("wide", summary="of tests")
    def wide(num_classes: int, in_chans: int, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_chans, width, 36), nn.Flatten(), nn.Linear(width, num_classes))

    try:
        model = cnvzoo.create_model("wide", num_classes=3, width=8)
        cnvzoo.save_checkpoint(model, tmp_path / "mine", preprocessing=cnvzoo.Preprocessing(36, (0.0,) * 3, (1.0,) * 3))
        changes = {"model": "wide", "w_bits": None, "a_bits": None, "dataset": str(photos)}
        recipe = recipe_from_dict(recipe_text(**changes, start=str(tmp_path / "mine")), "test")
        with pytest.raises(cnvzoo.ModelError, match=r"mine is a wide with width=8, and the recipe trains wide: name"):
            cnvzoo.train(recipe, quiet=True)
    finally:
        cnvzoo.unregister_model("wide")


def test_a_finished_run_of_another_version_of_the_model_is_refused(tmp_path: Path, uncompiled: None) -> None:
    widths = [4]

    @cnvzoo.register_model("edited", summary="of tests")
    def edited(num_classes: int, in_chans: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_chans, widths[0], 8), nn.Flatten(), nn.Linear(widths[0], num_classes))

    images = torch.randint(256, (24, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset.from_arrays(images, [0, 1] * 12, ["even", "odd"], test_images=images, test_labels=[0, 1] * 12)
    values = recipe_text(name="edited", model="edited", dataset="mnist", epochs=1, batch_size=8)
    recipe = recipe_from_dict({k: v for k, v in values.items() if k not in ("start", "w_bits", "a_bits")}, "test")
    arguments: dict[str, Any] = {"dataset": data, "run_dir": tmp_path / "run", "device": "cpu", "quiet": True}
    try:
        record = cnvzoo.train(recipe, **arguments).record
        widths[0] = 6
        says = (
            f"{tmp_path / 'run'}: holds the finished run of another version of edited, with other tensors: give "
            "another run_dir, or move that folder away"
        )
        with pytest.raises(RunError, match=f"^{re.escape(says)}$"):
            cnvzoo.train(recipe, **arguments)
        widths[0] = 4
        assert cnvzoo.train(recipe, **arguments).record == record
    finally:
        cnvzoo.unregister_model("edited")


def test_paths_are_paths_wherever_they_lead(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    """In the home folder for one, and without a separator: `mnist` is a folder here if it is given as a Path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(photos.rename(tmp_path / "mnist").parent)
    model = cnvzoo.create_model("quant_cnv", num_classes=3, w_bits=2, a_bits=2)
    cnvzoo.save_checkpoint(model, Path("cnv"), preprocessing=cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3))
    recipe = recipe_from_dict(recipe_text(epochs=1), "test")
    result = cnvzoo.train(recipe, dataset=Path("mnist"), start=Path("cnv"), run_dir="~/runs", device="cpu", quiet=True)
    assert result.model.classes == ("blue", "green", "red")
    assert result.record.start is not None
    assert result.record.start["checkpoint"] == "./cnv"
    assert (tmp_path / "runs" / "weights.safetensors").is_file()


def test_a_damaged_start_is_refused_before_the_run(photos: Path, tmp_path: Path) -> None:
    model = cnvzoo.create_model("quant_cnv", w_bits=2, a_bits=2)
    cnvzoo.save_checkpoint(model, tmp_path / "mine", preprocessing=cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3))
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"damaged")
    recipe = recipe_from_dict(recipe_text(dataset=str(photos), start=str(tmp_path / "mine")), "test")
    with pytest.raises(cnvzoo.CheckpointError, match=r"model\.safetensors: .*damaged"):
        cnvzoo.train(recipe, run_dir=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_run_recipe_is_given_own_images(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict(recipe_text(dataset=str(photos), start=None), "test")
    with pytest.raises(RunError, match=r"photos_quant_cnv_w2a2: trains on own images: give them, dataset=load_dataset"):
        run_recipe(recipe, run_dir=tmp_path / "run", quiet=True)


def test_a_recipe_that_own_images_do_not_fit_is_refused(photos: Path) -> None:
    recipe = recipe_from_dict(recipe_text(dataset=str(photos), batch_size=100), "test")
    with pytest.raises(cnvzoo.CnvzooError, match="batch_size: 100: must be at most 72, the training images of photos"):
        cnvzoo.train(recipe, quiet=True)


def test_a_recipe_of_the_benchmark_trains_on_own_images_without_its_teachers(
    photos: Path, tmp_path: Path, uncompiled: None
) -> None:
    """The example of `cnvzoo train --help`, with batches that fit."""
    recipe = cnvzoo.load_recipe("cifar10_quant_cnv_w4a4").model_copy(update={"batch_size": 12})
    own: dict[str, Any] = {"dataset": photos, "epochs": 1, "device": "cpu", "quiet": True}
    with pytest.warns(UserWarning, match=r"without float_start cifar10_cnv and teacher cifar10_cnv, of cifar10$"):
        result = cnvzoo.train(recipe, start="quant_cnv_w4a4.cifar10", **own)
    assert result.model.classes == ("blue", "green", "red")
    assert (result.record.float_start, result.record.teacher) == (None, None)
    assert result.record.start["checkpoint"] == "quant_cnv_w4a4.cifar10"  # type: ignore[index]
    assert cnvzoo.save_checkpoint(result, tmp_path / "mine").recipe["teacher"] == []


def test_loaded_images_of_other_classes_leave_the_teacher_out_too(photos: Path, uncompiled: None) -> None:
    data = cnvzoo.load_dataset(photos)
    recipe = cnvzoo.load_recipe("cifar10_quant_cnv_w4a4").model_copy(update={"batch_size": 12})
    with pytest.warns(UserWarning, match="trains on photos without float_start cifar10_cnv and teacher cifar10_cnv"):
        result = cnvzoo.train(recipe, dataset=data, epochs=1, device="cpu", quiet=True)
    assert (result.model.num_classes, result.record.teacher) == (3, None)


def test_a_folder_is_scored_as_the_model_takes_images(photos: Path, tmp_path: Path, uncompiled: None) -> None:
    values = recipe_text(name="photos_resnet20", model="resnet20", epochs=2)
    recipe = recipe_from_dict({k: v for k, v in values.items() if k not in ("start", "w_bits", "a_bits")}, "test")
    data = cnvzoo.load_dataset(photos, size=24)
    result = cnvzoo.train(recipe, dataset=data, device="cpu", quiet=True)
    expected = cnvzoo.evaluate(result.model, data, device="cpu").predictions
    assert torch.equal(cnvzoo.evaluate(result.model, photos, device="cpu").predictions, expected)
    other = shutil.copytree(photos, tmp_path / "other")
    for split in ("train", "test"):
        (other / split / "blue").rename(other / split / "violet")
    with pytest.raises(cnvzoo.ModelError, match="classes blue, green, red, and other has green, red, violet"):
        cnvzoo.evaluate(result.model, other, device="cpu")


def test_own_images_larger_than_the_model_takes_are_resized(tmp_path: Path, uncompiled: None) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        for n in range(10):
            path = tmp_path / "large" / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    values = recipe_text(name="large_cnv", model="cnv", dataset=str(tmp_path / "large"), batch_size=8, epochs=2)
    recipe = recipe_from_dict({k: v for k, v in values.items() if k not in ("start", "w_bits", "a_bits")}, "test")
    result = cnvzoo.train(recipe, device="cpu", quiet=True)
    assert result.record.data_sha256 == cnvzoo.load_dataset(tmp_path / "large", size=32).sha256
    cnvzoo.load_dataset(tmp_path / "large").save(tmp_path / "large.safetensors")
    with pytest.raises(RunError, match=r"side 64 cannot be padded .* to 32: .* load_dataset\(folder, size=32\)"):
        cnvzoo.train(recipe, dataset=tmp_path / "large.safetensors", quiet=True)


def test_digits_of_8_pixels_and_bits_of_patterns_can_be_saved(tmp_path: Path, uncompiled: None) -> None:
    images = torch.randint(256, (24, 8, 8), dtype=torch.uint8)
    data = Dataset.from_arrays(images, [0, 1] * 12, ["even", "odd"], test_images=images, test_labels=[0, 1] * 12)
    values = recipe_text(name="digits", dataset="mnist", batch_size=8, epochs=2, bits={"classifier.*": [4, 4]})
    recipe = recipe_from_dict({k: v for k, v in values.items() if k != "start"}, "test")
    result = cnvzoo.train(recipe, dataset=data, device="cpu", quiet=True, seed=2**63 - 1)
    config = cnvzoo.save_checkpoint(result, tmp_path / "digits")
    assert config.recipe["bits"] == config.model["bits"] == {"classifier.*": [4, 4]}
    assert (config.seed, config.recipe["seed"]) == (2**63 - 1, 2**63 - 1)
    loaded = cnvzoo.create_model(tmp_path / "digits", pretrained=True)
    assert cnvzoo.evaluate(loaded, data, device="cpu").correct == result.record.correct
