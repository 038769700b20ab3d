"""`cnvzoo.export` and the commands that use exported files, from a checkpoint to an accuracy."""

from __future__ import annotations

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
from cnvzoo.deploy.export import evaluate_file
from cnvzoo.errors import ModelError
from cnvzoo_runtime import runner

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
    monkeypatch.setattr(runner, "load", lambda path, **options: threads.append(options) or cnvzoo.deploy.load(path))
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
    with pytest.raises(ModelError, match=r"3 channel\(s\) and 10 classes, and mnist has 1"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", dataset="mnist")
    with pytest.raises(ModelError, match="Sequential is not a model of cnvzoo"):
        cnvzoo.export(nn.Sequential(), tmp_path / "m.onnx", dataset="mnist")


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
