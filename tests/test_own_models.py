"""What a model is travels with it: classes, labels, preprocessing and the card of a model of one's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import cnvzoo
from cnvzoo.checkpoints.folder import check_replaceable
from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.data import Dataset, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.train_and_save import _weights_files
from cnvzoo.training import load_recipe, recipe_from_dict
from cnvzoo_runtime.images import ImageError


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
    model = cnvzoo.create_model("cnv.mnist", pretrained=True)
    config = cnvzoo.save_checkpoint(cnvzoo.TrainResult(model, record), folder)
    return config, (folder / "README.md").read_text()


def test_a_model_that_was_changed_after_its_run_does_not_get_its_accuracy(tmp_path: Path) -> None:
    model = cnvzoo.create_model("cnv.mnist", pretrained=True)
    result = cnvzoo.TrainResult(model, cnvzoo.RunRecord.read(RECORD))
    assert cnvzoo.save_checkpoint(result, tmp_path / "mine").accuracy == 99.66
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(CheckpointError, match=r"other: the model no longer has the weights that its record scored: .*"):
        cnvzoo.save_checkpoint(result, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert cnvzoo.save_checkpoint(model, tmp_path / "other").accuracy is None


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
        (
            lambda api, model: api.save_checkpoint(model, "x", classes="abcdefghij"),
            "^classes='abcdefghij': give a list",
        ),
        (lambda api, model: api.save_checkpoint(model, "x", classes=10), "^classes=10: give a list of names, not int$"),
        (lambda api, model: api.save_checkpoint(model, "x", classes={*"abcdefghij"}), "give a list of names, not set$"),
        (
            lambda api, model: api.export(model, "x.onnx", format="onnx", classes=10),
            "^classes=10: give a list of names",
        ),
        (lambda api, model: api.transforms(5), "^5: transforms takes a model, a config, a"),
        (lambda api, model: api.publish([], None), "^None is not a store: give a directory, hf://ORG or a Store$"),
        (lambda api, model: api.predict("cnv.mnist", None), "^str is not a model: cnvzoo.create_model"),
        (lambda api, model: api.predict(model, "photo.png"), "^expected images, got str: open a file"),
        (lambda api, model: api.predict(model, b""), "^expected images, got bytes: open a file"),
        (
            lambda api, model: api.create_model("cnv.mnist", pretrained=""),
            "^pretrained='': True, or the name of a dataset",
        ),
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
