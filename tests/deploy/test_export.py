"""`cnvzoo.export` and the commands that use exported files, from a checkpoint to an accuracy."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import cnvzoo
import cnvzoo.deploy
from cnvzoo.cli.app import app
from cnvzoo.data import dataset_info
from cnvzoo.deploy import DeployError
from cnvzoo.deploy.export import evaluate_file
from cnvzoo.errors import ModelError
from cnvzoo.files import FileError
from cnvzoo.models.quant import PlainQuantReLU
from cnvzoo_runtime import deployed_model

HUB = Path(__file__).resolve().parents[2] / "hub"


def call(*arguments: object) -> tuple[int, str, BaseException | None]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output, done.exception


def test_export_eval_and_predict_on_the_command_line(make_checkpoint, small_datasets, tmp_path, monkeypatch):
    small_datasets(test=60)
    make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar10", w_bits=2, a_bits=2)
    monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "hub"))
    path = tmp_path / "m.onnx"
    status, output, error = call("export", "quant_cnv_w2a2.cifar10", "-o", path, "--format", "integer")
    assert status == 0, error
    assert f"quant_cnv_w2a2.cifar10 as integer, {path.stat().st_size:,} bytes" in output
    assert cnvzoo.deploy.load(path, threads=1).metadata.w_bits == 2

    model, _ = cnvzoo.load_checkpoint("quant_cnv_w2a2.cifar10")
    expected = cnvzoo.evaluate(model, "cifar10", device="cpu")
    status, output, error = call("eval", path, "--dataset", "cifar10")
    assert status == 0, error
    assert "of 60) on cifar10" in output
    found = evaluate_file(cnvzoo.deploy.load(path, threads=1), "cifar10")
    assert abs(found.correct - expected.correct) <= 1

    Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(tmp_path / "photo.png")
    status, output, error = call("predict", path, tmp_path / "photo.png", "--top", 2)
    assert status == 0, error
    assert output.startswith(f"{tmp_path / 'photo.png'}: ")
    assert output.count("%") == 2
    for letter in "abcdefghij":
        (tmp_path / "photos" / letter).mkdir(parents=True)
        Image.new("RGB", (40, 50), (len(letter), 2, 3)).save(tmp_path / "photos" / letter / "0.png")
    threads = []
    monkeypatch.setattr(
        deployed_model, "load", lambda path, **options: threads.append(options) or cnvzoo.deploy.load(path)
    )
    for arguments, message in (
        (
            ("eval", path, "--threads", 1, "--dataset", tmp_path / "photos"),
            "classes airplane, automobile, bird, cat, deer",
        ),
        (("predict", path), "no image after"),
        (("predict", tmp_path / "photo.png"), "either --checkpoint or"),
        (("eval", "quant_cnv_w2a2.cifar10", "--dataset", "mnist"), "3 channel(s) and 10 classes, and mnist"),
        (("eval", path, "--dataset", "mnist"), "3 channel(s) and 10 classes, and mnist has images of 28x28 pixels"),
    ):
        status, _, error = call(*arguments)
        assert status == 1
        assert message in str(error)
    assert threads[0] == {"threads": 1}
    for arguments in (
        ("eval", path, "--device", "cuda:7"),
        ("eval", path, "--hub", tmp_path),
        ("predict", path, tmp_path / "photo.png", "--hub", tmp_path),
    ):
        status, output, _ = call(*arguments)
        assert status == 2
        assert f"{arguments[-2]} is for checkpoints" in output


def test_the_dataset_must_be_known_and_fit_the_model(make_net, tmp_path):
    with pytest.raises(ModelError, match="give dataset="):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"takes 3 channel\(s\), and the images of mnist have 1"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", dataset="mnist")
    with pytest.raises(ModelError, match="the model has no last layer: give it one"):
        cnvzoo.export(cnvzoo.create_model("cnv", num_classes=0), tmp_path / "m.onnx", format="onnx", dataset="mnist")
    with pytest.raises(ModelError, match="Sequential is not a model of cnvzoo"):
        cnvzoo.export(nn.Sequential(), tmp_path / "m.onnx", dataset="mnist")


@pytest.mark.parametrize("format", ["integer", "qdq", "qonnx", "c"])
def test_normalised_images_are_for_plain_onnx_files_only(make_net, tmp_path, format):
    model = copy.deepcopy(make_net(2, 2))
    model.preprocessing = cnvzoo.Preprocessing.for_dataset(dataset_info("cifar10"), size=32)
    with pytest.raises(DeployError, match=rf"^format '{format}' takes images as pixels / 255, and this model has mean"):
        cnvzoo.export(model, tmp_path / ("m.c" if format == "c" else "m.onnx"), format=format)


def test_an_exported_model_keeps_the_normalisation_that_it_was_trained_with(tmp_path):
    model = cnvzoo.create_model("resnet20.mnist", pretrained=True)
    found = cnvzoo.export(model, tmp_path / "m.onnx", format="onnx", dataset="fashion_mnist")
    info = dataset_info("mnist")
    assert (found.mean, found.std) == (info.mean, info.std)
    assert (found.name, found.classes) == ("resnet20.fashion_mnist", dataset_info("fashion_mnist").classes)
    assert cnvzoo.export(model, tmp_path / "m.onnx", format="onnx", dataset="mnist").name == "resnet20.mnist"
    quantized = cnvzoo.create_model("quant_cnv_w2a2.mnist", pretrained=True)
    assert cnvzoo.export(quantized, tmp_path / "q.onnx", dataset="mnist").name == "quant_cnv_w2a2.mnist"


@pytest.mark.parametrize("name", ["net.c", "net.h"])
def test_the_path_of_an_onnx_file_is_not_that_of_c_source(make_net, tmp_path, name):
    with pytest.raises(DeployError, match=rf"{name}: format 'integer' writes an ONNX file: give a path that ends in"):
        cnvzoo.export(make_net(2, 2), tmp_path / name, dataset="cifar10")


@pytest.mark.parametrize(
    ("format", "module", "package"),
    [
        ("integer", "onnx", "onnx"),
        ("onnx", "onnxscript", "onnxscript"),
        ("qonnx", "onnxoptimizer", "onnxoptimizer"),
        ("qonnx", "qonnx.util.cleanup", "qonnx"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, format, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DeployError, match=rf"^format '{format}' needs the {package} package: pip install 'cnvzoo\[exp"):
        cnvzoo.export(nn.Identity(), tmp_path / "m.onnx", format=format)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": range(10)}, "'quant_cnv.cifar10' cannot be exported: class 0, 0, must be a printable name"),
        ({"classes": [*"abcdefghi", ""]}, r"class 9, '', must be a printable name"),
        ({"name": "a\nb"}, r"'a\\nb' cannot be exported: name 'a\\nb' must be printable text"),
        ({"classes": ["a" * 110_000] * 10}, r"1,100,.* characters, where 1,048,576 are allowed"),
    ],
)
@pytest.mark.parametrize("file", ["m.onnx", "m.c"])
def test_names_that_reading_would_refuse_are_not_written(make_net, tmp_path, file, changes, says):
    format = "c" if file.endswith(".c") else "integer"
    with pytest.raises(DeployError, match=says):
        cnvzoo.export(make_net(2, 2), tmp_path / file, format=format, **({"dataset": "cifar10"} | changes))
    assert not list(tmp_path.iterdir())


def test_spaces_of_every_kind_are_allowed_in_names(make_net, tmp_path):
    names = ["\u3000", "a\u00a0b", *"abcdefgh"]
    cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", dataset="cifar10", classes=names, name="a\u00a0b")
    assert cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1).metadata.classes == tuple(names)
    preprocessing = cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
    config = cnvzoo.save_checkpoint(make_net(2, 2), tmp_path / "net", classes=names, preprocessing=preprocessing)
    assert cnvzoo.load_checkpoint(tmp_path / "net")[1].classes == config.classes == names


def test_a_model_in_another_precision_is_exported_in_float32(make_net, tmp_path):
    model = copy.deepcopy(make_net(2, 2)).half()
    cnvzoo.export(model, tmp_path / "half.onnx", dataset="cifar10")
    assert next(model.parameters()).dtype == torch.float16
    cnvzoo.export(model.float(), tmp_path / "float.onnx", dataset="cifar10")
    assert (tmp_path / "half.onnx").read_bytes() == (tmp_path / "float.onnx").read_bytes()


class HeadFirst(nn.Module):
    """Its head is defined before its convolutions, the first of which is grouped."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, num_classes)
        self.conv = nn.Conv2d(in_chans, 6, 3, groups=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).amax((2, 3)))


def test_channels_and_classes_do_not_depend_on_the_order_of_layers(tmp_path):
    cnvzoo.register_model("head_first", summary="Of a test.")(HeadFirst)
    try:
        model = cnvzoo.create_model("head_first", num_classes=10).half()  # which the float graph has to be free of
        metadata = cnvzoo.export(model, tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    finally:
        cnvzoo.unregister_model("head_first")
    assert (metadata.in_chans, len(metadata.classes)) == (3, 10)
    images = np.zeros((2, 3, 32, 32), np.uint8)
    assert cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1).logits(images).shape == (2, 10)


def test_a_c_source_that_cannot_be_written_leaves_no_header(make_net, tmp_path):
    (tmp_path / "net.c").mkdir()
    with pytest.raises(FileError, match=r"net\.c"):
        cnvzoo.export(make_net(2, 2), tmp_path / "net.c", format="c", dataset="cifar10")
    assert [path.name for path in tmp_path.iterdir()] == ["net.c"]


def test_home_is_expanded_in_paths(make_net, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    preprocessing = cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
    cnvzoo.save_checkpoint(make_net(2, 2), "~/net", preprocessing=preprocessing)
    assert cnvzoo.write_card("~/net") is False
    status, _, error = call("export", "~/net", "-o", "~/m.onnx")
    assert status == 0, error
    assert cnvzoo.deploy.load("~/m.onnx", threads=1).metadata.name == "net"


def test_a_published_checkpoint_classifies_real_images_as_pytorch_does(real_data, tmp_path):
    data = cnvzoo.load_dataset("cifar10", root=real_data("cifar10"))
    model, _ = cnvzoo.load_checkpoint(HUB / "quant_cnv_w4a4.cifar10")
    images = data.test_images[:300].permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        expected = model(images / 255).argmax(1).numpy()
    cnvzoo.export(model, tmp_path / "m.onnx")
    found = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1).logits(images.numpy()).argmax(1)
    assert (found == expected).mean() >= 0.99
    assert (found == data.test_labels[:300].numpy()).mean() > 0.85


@pytest.mark.parametrize("format", ["integer", "qdq", "c"])
def test_a_layer_whose_class_may_do_something_else_is_refused(make_net, tmp_path, format):
    net = copy.deepcopy(make_net(w_bits=4, a_bits=4))
    target = tmp_path / f"net.{'c' if format == 'c' else 'onnx'}"
    name, layer = next((name, layer) for name, layer in net.named_modules() if type(layer) is PlainQuantReLU)
    layer.__class__ = type("Halved", (PlainQuantReLU,), {"__module__": __name__})
    with pytest.raises(DeployError, match=rf"{name} is of the class Halved, whose forward may be another: use a layer"):
        cnvzoo.export(net, target, format=format, dataset="cifar10")
    assert not target.exists()


def test_the_wrong_type_of_an_argument_is_named(make_net, tmp_path):
    with pytest.raises(DeployError, match=r"^unknown format None: "):
        cnvzoo.export(make_net(w_bits=4, a_bits=4), tmp_path / "net.onnx", format=None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"^classes='cat': give a list of names, not one text$"):
        cnvzoo.export(make_net(w_bits=4, a_bits=4), tmp_path / "net.onnx", classes="cat", dataset="cifar10")
