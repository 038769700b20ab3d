"""Plain ONNX: ONNX Runtime computes what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

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
    deployed = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1)
    images = noise(5)
    mean, std = (torch.tensor(v)[:, None, None] for v in (deployed.metadata.mean, deployed.metadata.std))
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).numpy()
    for count in (1, 5):
        np.testing.assert_allclose(deployed.logits(images[:count].numpy()), expected[:count], rtol=1e-3, atol=1e-4)
    with pytest.raises(DeployError, match="has logits, not accumulators"):
        deployed.accumulators(images.numpy())


class Branching(nn.Module):
    def __init__(self, num_classes, in_chans, branches):
        super().__init__()
        self.branches, self.fc = branches, nn.Linear(in_chans, num_classes)

    def forward(self, x):
        y = self.fc(x.mean((2, 3)))
        if self.branches and y.sum() > 0:
            y = y + 1
        return torch.linalg.svdvals(y[:, :, None] @ y[:, None])


@pytest.mark.parametrize(
    ("branches", "why"),
    [(True, "Could not guard on data-dependent expression"), (False, "No ONNX function found for .*_linalg_svd")],
)
def test_a_model_that_pytorch_cannot_export_is_refused_in_a_line(tmp_path, capfd, branches, why):
    cnvzoo.register_model("branching", summary="A net of a test.", min_size=8)(Branching)
    try:
        model = cnvzoo.create_model("branching", num_classes=10, branches=branches)
        says = rf"^PyTorch cannot export Branching to ONNX: {why}.*: change its forward"
        with pytest.raises(DeployError, match=says) as caught:
            cnvzoo.export(model, tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    finally:
        cnvzoo.unregister_model("branching")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_format_that_is_unknown_or_does_not_fit_is_refused(make_net, tmp_path):
    with pytest.raises(DeployError, match="with 'integer', 'qdq' or 'qonnx'"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    with pytest.raises(DeployError, match="unknown format 'onx': did you mean 'onnx'"):
        cnvzoo.export(make_net(2, 2), tmp_path / "m.onnx", format="onx", dataset="cifar10")
    assert not list(tmp_path.iterdir())
