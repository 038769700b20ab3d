"""The counts that are published of an integer graph, over a whole test set."""

from __future__ import annotations

import pytest
import torch

import cnvzoo
import cnvzoo.deploy
from cnvzoo.data import load_dataset
from cnvzoo.deploy import DeployedModel, DeployError
from cnvzoo.deploy.export import evaluate_file, measure_integer


@pytest.fixture
def published(tmp_path, small_datasets, make_checkpoint):
    """A quantized model with random weights, loaded from a checkpoint."""
    small_datasets(test=300)
    folder = make_checkpoint(tmp_path / "hub", "quant_cnv", "mnist", w_bits=2, a_bits=2)
    return cnvzoo.load_checkpoint(folder)[0]


def test_counts_are_those_of_the_exported_file_and_of_pytorch(published, tmp_path):
    data = load_dataset("mnist")
    result = measure_integer(published, data, quiet=True)
    cnvzoo.export(published, tmp_path / "m.onnx")
    deployed = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1)
    assert result.correct == evaluate_file(deployed, data).correct
    assert result.bytes == (tmp_path / "m.onnx").stat().st_size
    images = torch.zeros(300, 1, 32, 32, dtype=torch.uint8)
    images[:, 0, 2:30, 2:30] = data.test_images[..., 0]
    with torch.no_grad():
        expected = published(images / 255).argmax(1).numpy()
    assert result.agreeing == (deployed.logits(images.numpy()).argmax(1) == expected).sum()
    assert result.agreeing > 150
    assert 0 <= result.differing < result.reachable


def test_a_resnet_is_measured(tmp_path, small_datasets, make_checkpoint):
    small_datasets(test=12)
    model, _ = cnvzoo.load_checkpoint(
        make_checkpoint(tmp_path / "hub", "quant_resnet20", "cifar10", w_bits=2, a_bits=4)
    )
    data = load_dataset("cifar10")
    result = measure_integer(model, data, quiet=True)
    facts = cnvzoo.export(model, tmp_path / "m.onnx")
    assert (facts.w_bits, facts.a_bits) == (2, 4)
    assert result.bytes == (tmp_path / "m.onnx").stat().st_size
    found = evaluate_file(cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1), data)
    assert (result.correct, 12) == (found.correct, found.total)
    with torch.no_grad():
        expected = model(data.test_images.permute(0, 3, 1, 2) / 255).argmax(1)
    assert result.agreeing == int((found.predictions == expected).sum())
    assert result.agreeing >= 11


def test_an_output_that_differs_from_the_reference_is_an_error(published, monkeypatch):
    true_outputs = DeployedModel.accumulators

    def off_by_one(self, images):
        found = true_outputs(self, images)
        found[-1, 3] += 1
        return found

    monkeypatch.setattr(DeployedModel, "accumulators", off_by_one)
    with pytest.raises(DeployError, match=r"quant_cnv_w2a2.mnist: .* differ on test images 0 to 249"):
        measure_integer(published, "mnist", quiet=True)
