"""What a model is travels with it: from own images through fine-tuning, saving and exporting to a file that runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import cnvzoo
from cnvzoo.checkpoints.folder import check_replaceable
from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.cli.app import app
from cnvzoo.data import Dataset, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.train_and_save import _weights_files
from cnvzoo.training import RunError, load_recipe, recipe_from_dict, run_recipe
from cnvzoo_runtime.images import ImageError

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


def test_a_model_adapted_to_other_classes_has_no_old_name_label_or_accuracy() -> None:
    with pytest.warns(UserWarning, match="new and untrained"):
        model, config = cnvzoo.load_checkpoint("cnv.cifar10", num_classes=12)
    assert (config.name, config.dataset, config.accuracy, config.results) == ("cnv", None, None, [])
    assert config.classes == [str(n) for n in range(12)]
    assert (model.classes, model.pretrained_cfg) == (None, None)
    found = cnvzoo.predict(model.eval(), torch.zeros(3, 32, 32, dtype=torch.uint8), top=20)
    assert sorted(guess.label for guess in found) == sorted(map(str, range(12)))
    with pytest.warns(UserWarning, match="summed"):
        grey = cnvzoo.create_model("cnv.cifar10", pretrained=True, in_chans=1)
    assert grey.classes == dataset_info("cifar10").classes
    assert cnvzoo.predict(grey, Image.new("RGB", (50, 60)))[0].label in dataset_info("cifar10").classes


def test_a_head_replaced_by_hand_does_not_keep_the_old_labels() -> None:
    model = cnvzoo.create_model("resnet20.cifar10", pretrained=True)
    model.fc = nn.Linear(64, 3)  # type: ignore[attr-defined]
    assert {guess.label for guess in cnvzoo.predict(model, Image.new("RGB", (32, 32)))} == {"0", "1", "2"}


def test_predict_refuses_a_model_without_a_last_layer() -> None:
    """Its outputs are features: a softmax of them would be named after classes."""
    image = Image.new("RGB", (32, 32))
    model = cnvzoo.create_model("resnet20.cifar10")
    model.reset_classifier(0)
    model.register_forward_pre_hook(lambda *_: pytest.fail("it must not be computed"))
    says = r"^the ResNet has no last layer: reset_classifier\(n\), or create it with num_classes=$"
    with pytest.raises(cnvzoo.ModelError, match=says):
        cnvzoo.predict(model, image)
    model = cnvzoo.create_model("resnet20.cifar10", num_classes=0)
    with pytest.raises(cnvzoo.ModelError, match=says):
        cnvzoo.predict(model, image)
    model.reset_classifier(2)
    assert len(cnvzoo.predict(model, image)) == 2


def test_an_error_of_predict_says_which_image_of_a_list_is_bad() -> None:
    model, image = cnvzoo.create_model("resnet20.cifar10"), torch.zeros(3, 32, 32, dtype=torch.uint8)
    bad: list[tuple[Any, str]] = [
        (image.float(), "an image tensor has to be uint8 (0 to 255), got torch.float32"),
        (image[None], "a batch of shape [1, 3, 32, 32]: give a list of its images, list(batch)"),
        ("photo.png", "expected a PIL image or a uint8 array [H, W, C], got str"),
    ]
    for wrong, says in bad:
        with pytest.raises(ImageError, match=f"^{re.escape(f'images[1]: {says}')}$"):
            cnvzoo.predict(model, [image, wrong])
    for wrong, says in bad[:2]:
        with pytest.raises(ImageError, match=f"^{re.escape(says)}$"):
            cnvzoo.predict(model, wrong)
    assert len(cnvzoo.predict(model, list(image[None].expand(300, -1, -1, -1)), top=1)) == 300


def test_a_model_that_does_not_know_its_preprocessing_is_refused_with_what_the_function_takes(tmp_path: Path) -> None:
    model = cnvzoo.create_model("resnet20", num_classes=2)
    unknown = "the ResNet does not know its preprocessing"
    with pytest.raises(cnvzoo.ModelError, match=f"^{unknown}: set model.preprocessing$"):
        cnvzoo.predict(model, Image.new("RGB", (32, 32)))
    with pytest.raises(cnvzoo.ModelError, match=f"^{unknown}: give preprocessing=, or set model.preprocessing$"):
        cnvzoo.save_checkpoint(model, tmp_path / "mine")
    says = f"^{unknown}: give the dataset that it was trained on, or set model.preprocessing$"
    with pytest.raises(cnvzoo.ModelError, match=says):
        cnvzoo.transforms(model)
    says = "^Linear is not a model of cnvzoo: give a Preprocessing in its place$"
    with pytest.raises(cnvzoo.ModelError, match=says):
        cnvzoo.transforms(nn.Linear(1, 1), "mnist")


def test_saving_says_only_what_is_known(tmp_path: Path) -> None:
    model = cnvzoo.create_model("resnet20", num_classes=2)
    with pytest.raises(cnvzoo.ModelError, match="does not know its preprocessing"):
        cnvzoo.save_checkpoint(model, tmp_path / "mine")
    preprocessing = cnvzoo.Preprocessing(32, (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(cnvzoo.ModelError, match="3 classes were given, and the model has 2"):
        cnvzoo.save_checkpoint(model, tmp_path / "mine", classes=["a", "b", "c"], preprocessing=preprocessing)
    config = cnvzoo.save_checkpoint(model, tmp_path / "mine", classes=["cat", "dog"], preprocessing=preprocessing)
    assert (config.accuracy, config.dataset, config.recipe, config.results) == (None, None, {}, [])
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "## Accuracy" not in card
    assert "## Reproduce" not in card
    limits = card.partition("## Limits")[2]
    assert "It knows only its 2 classes." in limits
    assert "Its accuracy on a test set is not known." in limits
    assert not any(claim in limits for claim in ("top-1", "tested", "unknown dataset", "licence"))
    loaded = cnvzoo.create_model(tmp_path / "mine", pretrained=True)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))
    assert loaded.classes == ("cat", "dog")
    with pytest.raises(cnvzoo.CheckpointError, match="not the name of a checkpoint"):
        cnvzoo.save_checkpoint(model, tmp_path / "my model", preprocessing=preprocessing)


class Own(nn.Module):
    """A topology with options and, if asked for, one tensor under two names."""

    def __init__(self, num_classes: int, in_chans: int, widths: Any = None, act: Any = nn.ReLU, tied: bool = False):
        super().__init__()
        self.stem, self.act = nn.Conv2d(in_chans, 4, 3, padding=1), act()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        if tied:
            self.third.weight = self.second.weight
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.third(self.second(self.act(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def own_net() -> Iterator[str]:
    cnvzoo.register_model("own_net", summary="A net of a test.", min_size=16)(Own)
    yield "own_net"
    cnvzoo.unregister_model("own_net")


@pytest.mark.parametrize(
    ("options", "size", "classes", "says"),
    [
        ({"widths": (8, 8)}, 32, "ab", r"cannot have these values: model: widths: nested too deep, or a collection"),
        ({"act": nn.SiLU}, 32, "ab", r"model: act: <class '.*SiLU'> is not text, a number, true, false or null"),
        ({}, 8, "ab", "own_net takes images of at least 16x16"),
        ({}, 32, [f"{'a' * 190}{n}" for n in range(2000)], "a config of [0-9,]+ bytes, where 262,144 are read"),
    ],
    ids=["a tuple", "a class", "too small images", "too large a config"],
)
def test_what_cannot_be_read_again_is_not_saved(
    tmp_path: Path, own_net: str, options: dict[str, Any], size: int, classes: Any, says: str
) -> None:
    model = cnvzoo.create_model(own_net, num_classes=len(classes), **options)
    preprocessing = cnvzoo.Preprocessing(size, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises((cnvzoo.CheckpointError, cnvzoo.ModelError), match=rf"^[^\n]*{says}[^\n]*$"):
        cnvzoo.save_checkpoint(model, tmp_path / "mine", classes=list(classes), preprocessing=preprocessing)
    assert not (tmp_path / "mine").exists()


def test_tied_weights_are_saved(tmp_path: Path, own_net: str) -> None:
    model = cnvzoo.create_model(own_net, num_classes=2, tied=True).eval()
    preprocessing = cnvzoo.Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    cnvzoo.save_checkpoint(model, tmp_path / "mine", preprocessing=preprocessing)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(cnvzoo.load_checkpoint(tmp_path / "mine")[0](images), model(images))


RECORD = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "mnist_cnv" / "seed0.json"


def card_of_a_run(folder: Path, **changes: Any) -> tuple[cnvzoo.CheckpointConfig, str]:
    """Config and card of a model of a published recipe's run, with other facts in its record."""
    values = json.loads(RECORD.read_text()) | changes
    if values["epochs"] != len(values["history"]):
        values["history"] = values["history"][: values["epochs"]]
    if "data_sha256" in changes:
        recipe = recipe_from_dict(values["recipe"], "test")
        values["recipe_sha256"] = recipe.fingerprint(values["data_sha256"])
    record = cnvzoo.RunRecord.model_validate(values)
    model = cnvzoo.create_model("cnv.mnist")
    config = cnvzoo.save_checkpoint(cnvzoo.TrainResult(model, record), folder)
    return config, (folder / "README.md").read_text()


def test_the_card_of_an_own_run_promises_no_reproduction(tmp_path: Path) -> None:
    config, card = card_of_a_run(tmp_path / "full")
    assert (config.dataset, config.total, config.trial) == ("mnist", 10_000, None)
    assert "trial" not in json.loads((tmp_path / "full" / "config.json").read_text())
    assert "on the test set of MNIST: 9,966 of 10,000 images" in card
    assert "This run is in no table of cnvzoo, so no command trains it again." in card
    assert "reproduce.py" not in card
    assert "None" not in card
    assert "trial" not in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 2}, "a trial of the recipe: 2 of its 8 epochs."),
        (
            {"holdout": 5000, "total": 5000, "correct": 4975, "accuracy": 99.5},
            "a trial of the recipe: 8 of its 8 epochs, scored on 5,000 held-out training images and not on the test",
        ),
    ],
    ids=["fewer epochs", "held-out images"],
)
def test_the_card_of_a_trial_says_so(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config, card = card_of_a_run(tmp_path / "trial", trial=True, **changes)
    assert said in card
    assert ("## Accuracy" in card) == ("holdout" not in changes)
    assert cnvzoo.load_checkpoint(tmp_path / "trial")[1] == config


def test_a_run_on_other_images_than_its_recipe_names_says_nothing_of_the_dataset(tmp_path: Path) -> None:
    config, card = card_of_a_run(tmp_path / "own", data_sha256="0" * 64)
    assert (config.dataset, config.accuracy, "dataset" in config.recipe) == (None, None, False)
    assert "MNIST" not in card
    assert "ylecun" not in card
    assert "## Accuracy" not in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_quantized_model_in_half_precision_is_saved_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True).to(dtype)
    cnvzoo.save_checkpoint(model, tmp_path / "half")
    image = Image.new("RGB", (32, 32), (10, 200, 30))
    assert cnvzoo.predict(cnvzoo.create_model(tmp_path / "half", pretrained=True), image)


def test_export_takes_classes_and_a_name(tmp_path: Path) -> None:
    model = cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True)
    own = [f"class {letter}" for letter in "abcdefghij"]
    metadata = cnvzoo.export(model, tmp_path / "a.onnx", classes=own, name="letters")
    assert (metadata.name, metadata.classes) == ("letters", tuple(own))
    with pytest.raises(cnvzoo.ModelError, match="10 classes, and cifar10 has 3 and 2"):
        cnvzoo.export(model, tmp_path / "b.onnx", classes=["a", "b"])


def test_transforms_ask_the_model_for_its_normalisation() -> None:
    own = cnvzoo.create_model("quant_cnv", w_bits=4, a_bits=4)
    with pytest.raises(cnvzoo.ModelError, match="give the dataset that it was trained on"):
        cnvzoo.transforms(own)
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(cnvzoo.transforms(own, "cifar10")(image), torch.ones(3, 32, 32))  # not normalised
    grey = cnvzoo.transforms(cnvzoo.create_model("cnv", in_chans=1), "mnist")(image)
    assert grey.shape == (1, 32, 32)  # padded to what CNV takes
    assert cnvzoo.transforms("cifar10")(torch.stack([image, image])).shape == (2, 3, 32, 32)


def test_transforms_take_a_loaded_dataset() -> None:
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset.from_arrays(images, [0, 1] * 4, ["a", "b"], test_images=images, test_labels=[0, 1] * 4)
    image, expected = images[0].permute(2, 0, 1), cnvzoo.Preprocessing.for_dataset(data.info)(images[:1])[0]
    assert torch.equal(cnvzoo.transforms(data)(image), expected)
    assert torch.equal(cnvzoo.transforms(cnvzoo.create_model("resnet20", num_classes=2), data)(image), expected)


def test_quantize_asks_the_model_for_its_preprocessing() -> None:
    model = cnvzoo.quantize(cnvzoo.create_model("cnv.mnist", pretrained=True), w_bits=8, a_bits=8)
    assert model.classes == tuple("0123456789")
    assert model.preprocessing == cnvzoo.Preprocessing(32, (0.0,), (1.0,), 28)


def test_a_dataset_of_other_classes_is_refused(small_datasets) -> None:
    small_datasets(train=100, test=20)
    model = cnvzoo.create_model("resnet20.cifar10", pretrained=True)
    with pytest.raises(cnvzoo.ModelError, match="the model has 10 classes, and cifar100 has 100"):
        cnvzoo.evaluate(model, "cifar100", device="cpu")


class Fixed(nn.Module):
    """Logits that were computed before, by the level of an image's first pixel."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[(x[:, 0, 0, 0] * 255).round().long()]


def test_evaluation_has_top5_confusion_and_predictions() -> None:
    logits = torch.tensor(
        [[9.0, 1, 1, 1, 1, 1, 0], [0, 5, 4, 3, 2, 1, 9], [1, 1, 1, 1, 1, 1, 1], [6, 5, 4, 3, 2, 1, 0]]
    )
    images = torch.arange(4, dtype=torch.uint8)[:, None, None].repeat(1, 8, 8)
    labels = [0, 5, 5, 5]
    data = Dataset.from_arrays(images, labels, list("abcdefg"), test_images=images, test_labels=labels)
    result = cnvzoo.evaluate(Fixed(logits), data, preprocessing=cnvzoo.Preprocessing(8, (0.0,), (1.0,)), device="cpu")
    assert result.predictions.tolist() == [0, 6, 0, 0]
    assert (result.correct, result.total, result.accuracy) == (1, 4, 25.0)
    assert (result.top5_correct, result.top5_accuracy) == (
        1,
        25.0,
    )  # 5 is the sixth of [1]; of [2], five come before it
    matrix = result.confusion_matrix()
    assert matrix[0].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert matrix[5].tolist() == [2, 0, 0, 0, 0, 0, 1]
    assert matrix.sum() == 4


def test_logits_that_are_not_numbers_are_no_top5() -> None:
    """As for argmax, NaN is larger than all numbers."""
    labels = torch.arange(10)
    lost = cnvzoo.Evaluation.of_logits(torch.full((10, 10), math.nan), labels)
    assert (lost.accuracy, lost.top5_accuracy) == (10.0, 50.0)  # classes 0 to 4, as for equal logits
    partly = torch.eye(10)
    partly[:, 4:] = math.nan
    found = cnvzoo.Evaluation.of_logits(partly, labels)
    assert found.predictions.tolist() == [4] * 10
    assert found.top5_correct == 5  # 4 to 8: six are NaN


def test_a_checkpoint_is_not_written_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    model = cnvzoo.create_model("cnv.mnist")
    for place in (tmp_path / "photo.png", tmp_path / "photo.png" / "x"):
        with pytest.raises(CheckpointError, match=r"photo\.png is a file, not a folder: choose another folder$"):
            check_replaceable(place)
        with pytest.raises(CheckpointError, match=r"photo\.png is a file, not a folder"):
            cnvzoo.save_checkpoint(model, place)
    assert (tmp_path / "photo.png").read_bytes() == b"x"


def test_a_model_without_a_last_layer_is_not_saved(tmp_path: Path) -> None:
    model = cnvzoo.create_model("cnv.mnist", num_classes=0)
    with pytest.raises(ModelError, match=r"^CNV has no last layer, and a checkpoint needs one: give it one"):
        cnvzoo.save_checkpoint(model, tmp_path / "x")


def test_own_weights_have_no_licence_of_ours(tmp_path: Path) -> None:
    cnvzoo.save_checkpoint(cnvzoo.create_model("cnv.mnist"), tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "license" not in card
    assert "- PyTorch runs the model" not in card  # of quantized ones
    with (tmp_path / "mine" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"not the file that config\.json describes: it is damaged or"):
        cnvzoo.load_checkpoint(tmp_path / "mine")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda api, model: api.create_model(None), "^None: the name of a model or checkpoint is text, and its"),
        (lambda api, model: api.load_checkpoint(None), "^None: the name of a model or checkpoint is text"),
        (lambda api, model: api.verify([None]), "^None: the name of a model or checkpoint is text"),
        (lambda api, model: api.export(None, "x.onnx"), "^None: the name of a model or checkpoint is text"),
        (lambda api, model: api.evaluate(model, None), "^None: a dataset is given by its name"),
        (lambda api, model: api.load_dataset(5), "^5: a dataset is given by its name"),
        (lambda api, model: api.evaluate(model, "mnist", preprocessing="mnist"), "^preprocessing='mnist': give"),
        (lambda api, model: api.save_checkpoint(model, "x", preprocessing="mnist"), "^preprocessing='mnist': give"),
        (lambda api, model: api.transforms(5), "^5: transforms takes a model, a config, a"),
        (lambda api, model: api.publish([], None), "^None is not a store: give a directory, hf://ORG or a Store$"),
        (lambda api, model: api.predict("cnv.mnist", None), "^str is not a model: cnvzoo.create_model"),
        (lambda api, model: api.predict(model, "photo.png"), "^expected images, got str: open a file"),
        (lambda api, model: api.predict(model, b""), "^expected images, got bytes: open a file"),
        (lambda api, model: api.create_model("cnv."), "^unknown dataset ''"),
        (lambda api, model: api.create_model("cnv.mnist", pretrained=True, foo=1), "^cnv has no option 'foo'"),
        (
            lambda api, model: api.create_model("cnv.mnist", pretrained=True, w_bits=4, a_bits=4),
            "^cnv is a float model",
        ),
        (
            lambda api, model: api.create_model("quant_cnv_w9a9.mnist", pretrained=True),
            "^w_bits=9 is not a whole number",
        ),
        (
            lambda api, model: api.create_model("quant_cnv.mnist", pretrained=True, w_bits=4.0, a_bits=4),
            "^w_bits=4.0 is",
        ),
        (lambda api, model: api.create_model("./hub/cnv.mnist", pretrained=True, foo=1), "^cnv has no option 'foo'"),
        (
            lambda api, model: api.load_checkpoint("cnv.mnist", num_classes=-1),
            "without its last layer has 0$",
        ),
        (
            lambda api, model: api.load_checkpoint("cnv.mnist", hub="/nowhere"),
            "^/nowhere: no such folder: give a",
        ),
        (
            lambda api, model: api.transforms(api.create_model("cnv", in_chans=5), "mnist"),
            r"^the model takes 5 channel\(s\), and the images of mnist have 1$",
        ),
    ],
)
def test_a_wrong_argument_is_refused_in_a_line(call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    model = cnvzoo.create_model("cnv.mnist")
    with pytest.raises((cnvzoo.CnvzooError, ImageError), match=message) as caught:
        call(cnvzoo, model)
    assert "\n" not in str(caught.value)


def test_a_float_start_is_known_by_its_model_whatever_its_recipe_is_called(tmp_path: Path) -> None:
    recipe = "dataset: mnist\nepochs: 2\nbatch_size: 64\noptimizer: {lr: 0.1}\n"
    (tmp_path / "mine.yaml").write_text(f"model: cnv\n{recipe}")
    (tmp_path / "q.yaml").write_text(f"model: quant_cnv\nw_bits: 4\na_bits: 4\nfloat_start: mine\n{recipe}")
    (found,) = _weights_files(load_recipe(tmp_path / "q.yaml"), "float_start", ["cnv.mnist"], None)
    assert found.parts[-2:] == ("cnv.mnist", "model.safetensors")
