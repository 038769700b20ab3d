"""The runner: it works without torch, and says clearly what it cannot take."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

import cnvzoo
import cnvzoo.deploy
from cnvzoo.data import dataset_info
from cnvzoo.deploy import DeployError
from cnvzoo_runtime import runner
from cnvzoo_runtime.images import ImageError

_WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "brevitas", "onnx", "pydantic", "typer", "safetensors"}:
            raise ImportError(f"{name} is not needed here")
sys.meta_path.insert(0, Refuse())
import cnvzoo.deploy, numpy
model = cnvzoo.deploy.load(sys.argv[1], threads=1)
predictions = model.predict([numpy.zeros((40, 50, 3), numpy.uint8)], top=2)
print(len(predictions[0]), predictions[0][0].label)
"""


@pytest.fixture(scope="module")
def exported(make_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    cnvzoo.export(make_net(2, 2), path, dataset="cifar10")
    return path


def test_exported_files_run_without_torch(exported):
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, str(exported)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, label = done.stdout.split()
    assert count == "2"
    assert label in dataset_info("cifar10").classes


def test_predict_is_the_softmax_of_the_logits(exported):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(3, 32, 32, 3)).astype(np.uint8)
    model = cnvzoo.deploy.load(exported, threads=1)
    expected = torch.from_numpy(model.logits(images.transpose(0, 3, 1, 2))).softmax(1)
    for row, predictions in zip(expected, model.predict(images, top=10), strict=True):
        np.testing.assert_allclose([g.probability for g in predictions], [row[g.index] for g in predictions], rtol=1e-5)
        assert [g.probability for g in predictions] == sorted((g.probability for g in predictions), reverse=True)
        assert predictions[0].label == dataset_info("cifar10").classes[predictions[0].index]
    as_list = model.predict([Image.fromarray(image) for image in images], top=10)
    assert as_list == model.predict(images, top=10)
    assert model.predict([]) == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), "uint8 array .* got float32"),
        (np.zeros((1, 3, 28, 28), np.uint8), r"\[N, 3, 32, 32\], got shape \[1, 3, 28, 28\]"),
        (np.zeros((3, 32, 32), np.uint8), r"got shape \[3, 32, 32\]"),
        ([[0]], "got list"),
    ],
)
def test_logits_refuses_arrays_of_other_dtypes_and_shapes(exported, images, message):
    with pytest.raises(DeployError, match=message):
        cnvzoo.deploy.load(exported, threads=1).logits(images)


def test_predict_refuses_what_is_not_a_list_of_images(exported):
    model = cnvzoo.deploy.load(exported, threads=1)
    with pytest.raises(ImageError, match="got str"):
        model.predict(["photo.png"])
    with pytest.raises(DeployError, match="put a single image in a list"):
        model.predict(Image.new("RGB", (8, 8)))


def _rewrite(path, target, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, target)
    return target


def _with_metadata(**changes):
    def change(model):
        entry = model.metadata_props[0]
        entry.value = json.dumps(json.loads(entry.value) | changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.metadata_props.pop(), "not one that cnvzoo exported"),
        (_with_metadata(version=9), "version 9, and this cnvzoo reads 1"),
        (_with_metadata(classes=["cat"]), "with 1 classes"),
        (_with_metadata(size=40), "its input is not"),
        (_with_metadata(scale=-1.0), "scale positive"),
        (_with_metadata(format="zip"), "format 'zip' is none of"),
        (_with_metadata(extra=1), "damaged"),
        (lambda m: setattr(m.metadata_props[0], "value", "{"), "damaged"),
    ],
)
def test_a_file_with_invalid_metadata_is_refused(exported, tmp_path, change, message):
    path = _rewrite(exported, tmp_path / "other.onnx", change)
    with pytest.raises(DeployError, match=message):
        cnvzoo.deploy.load(path, threads=1)


def test_a_file_that_cnvzoo_did_not_export_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(DeployError, match=r"text.onnx: not an ONNX file"):
        cnvzoo.deploy.load(tmp_path / "text.onnx")
    with pytest.raises(DeployError, match=r"none.onnx: cannot be read"):
        cnvzoo.deploy.load(tmp_path / "none.onnx")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "f.onnx")
    with pytest.raises(DeployError, match="not one that cnvzoo exported"):
        cnvzoo.deploy.load(tmp_path / "f.onnx")


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", "flags : avx512f avx512_vnni amx_tile", True),
        ("x86_64", "flags : fma avx2 avx_vnni", True),
        ("x86_64", "flags : fma avx2 avx512f", False),
        ("AMD64", None, False),
        ("aarch64", None, True),
    ],
)
def test_exact_kernels_are_chosen_where_the_fast_ones_may_saturate(monkeypatch, tmp_path, machine, flags, exact):
    """ONNX Runtime's fast kernels on x86 CPUs without VNNI."""
    monkeypatch.setattr(runner.platform, "machine", lambda: machine)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert runner.sums_products_exactly(tmp_path / "cpuinfo") is exact


def test_exact_kernels_give_the_same_accumulators(exported, noise, monkeypatch):
    images = noise(4).numpy()
    fast = cnvzoo.deploy.load(exported, threads=1).accumulators(images)
    monkeypatch.setattr(runner, "sums_products_exactly", lambda: False)
    np.testing.assert_array_equal(cnvzoo.deploy.load(exported, threads=1).accumulators(images), fast)
