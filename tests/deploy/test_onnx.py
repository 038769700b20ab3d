"""Plain ONNX: ONNX Runtime computes what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import cnvzoo
import cnvzoo.deploy
from cnvzoo.deploy import DeployError


@pytest.mark.parametrize("name", ["cnv", "resnet20"])
def test_plain_onnx_equals_pytorch_at_any_batch(tmp_path, noise, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cnvzoo.create_model(name).eval()
    cnvzoo.export(model, tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    content = (tmp_path / "m.onnx").read_bytes()
    for path in (cnvzoo.__file__, torch.__file__):  # the exporter writes stack traces into its files
        assert str(Path(path).parent).encode() not in content
    runner = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1)
    images = noise(5)
    mean, std = (torch.tensor(v)[:, None, None] for v in (runner.metadata.mean, runner.metadata.std))
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).numpy()
    for count in (1, 5):
        np.testing.assert_allclose(runner.logits(images[:count].numpy()), expected[:count], rtol=1e-3, atol=1e-4)
    with pytest.raises(DeployError, match="has logits, not accumulators"):
        runner.accumulators(images.numpy())


def test_a_format_that_is_unknown_or_does_not_fit_is_refused(make_net, tmp_path):
    with pytest.raises(DeployError, match="with 'integer', 'qdq' or 'qonnx'"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    with pytest.raises(DeployError, match="unknown format 'onx': did you mean 'onnx'"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", format="onx", dataset="cifar10")
    assert not list(tmp_path.iterdir())
