"""QONNX and plain ONNX: executed by their own tools, they say what PyTorch says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import cnvzoo
import cnvzoo.deploy
from cnvzoo.deploy import DeployError


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (2, 2), (1, 2)])
def test_qonnx_equals_pytorch(make_net, noise, tmp_path, w_bits, a_bits):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = make_net(w_bits, a_bits)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cnvzoo.export(model, tmp_path / "m.onnx", format="qonnx", dataset="cifar10")
    wrapped = ModelWrapper(str(tmp_path / "m.onnx"))
    assert [wrapped.graph.input[0].name, wrapped.graph.output[0].name] == ["global_in", "global_out"]
    assert {"": 13}.items() <= {entry.domain: entry.version for entry in wrapped.model.opset_import}.items()
    quantizers = [node for node in wrapped.graph.node if node.op_type in ("Quant", "BipolarQuant")]
    assert len(quantizers) == 9 + 9  # weights; the image and eight activations
    image = noise(3)[2:] / 255
    found = execute_onnx(wrapped, {"global_in": image.numpy()})["global_out"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(image).numpy(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_qonnx_refuses_what_it_cannot_say(make_net, tmp_path):
    with pytest.raises(DeployError, match="1-bit activations"):
        cnvzoo.export(make_net(1, 1), tmp_path / "m.onnx", format="qonnx", dataset="cifar10")
    with pytest.raises(DeployError, match="QONNX is for quantized models"):
        cnvzoo.export(cnvzoo.create_model("cnv"), tmp_path / "m.onnx", format="qonnx", dataset="cifar10")
    assert not list(tmp_path.iterdir())


def test_qonnx_is_not_for_the_runner(make_net, tmp_path):
    cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", format="qonnx", dataset="cifar10")
    with pytest.raises(DeployError, match="QONNX is for FINN"):
        cnvzoo.deploy.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["cnv", "resnet20"])
def test_plain_onnx_equals_pytorch_at_any_batch(tmp_path, noise, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cnvzoo.create_model(name).eval()
    cnvzoo.export(model, tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    runner = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1)
    images = noise(5)
    mean, std = (torch.tensor(v)[:, None, None] for v in (runner.metadata.mean, runner.metadata.std))
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).numpy()
    for count in (1, 5):
        np.testing.assert_allclose(runner.logits(images[:count].numpy()), expected[:count], rtol=1e-3, atol=1e-4)
    with pytest.raises(DeployError, match="has logits, not accumulators"):
        runner.accumulators(images.numpy())


def test_quantized_models_are_no_plain_onnx(make_net, tmp_path):
    with pytest.raises(DeployError, match="format='integer' or 'qonnx'"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    with pytest.raises(DeployError, match="unknown format 'onx': did you mean 'onnx'"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", format="onx", dataset="cifar10")
    assert not list(tmp_path.iterdir())
