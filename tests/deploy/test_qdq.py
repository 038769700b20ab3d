"""QuantizeLinear and DequantizeLinear: ONNX Runtime and OpenVINO compute what the reference computes in integers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import cnvzoo
import cnvzoo.deploy
from cnvzoo.deploy import DeployedModel, DeployError
from cnvzoo.deploy.integer import Head, Image, IntegerNet, Layer, Node, Rounding, Sum
from cnvzoo.deploy.lowering import integer_net
from cnvzoo.deploy.qdq_onnx import qdq_graph
from cnvzoo.deploy.reference import run_reference
from cnvzoo.deploy.requantize import Requantization, StepFunctions, requantize
from cnvzoo_runtime import graphs
from cnvzoo_runtime.metadata import KEY, Metadata

COUNTS = np.zeros(1, np.int64)
RUNTIMES = ("onnxruntime", "openvino")
# on x86 without VNNI, where the tests run OpenVINO all the same
pytestmark = pytest.mark.filterwarnings("ignore:.*can saturate in OpenVINO:UserWarning")


def unsaturated(images: torch.Tensor) -> np.ndarray:
    """The images, on x86 without VNNI at half their brightness: OpenVINO's sums of 8-bit products saturate there, and
    two of a pixel up to 127 and a weight of 8 bits do not."""
    return (images if graphs.sums_products_exactly() else images // 2).numpy()


@pytest.fixture(scope="module", autouse=True)
def no_reports() -> Iterator[None]:
    """OpenVINO without its package that sends figures of use."""
    with pytest.MonkeyPatch.context() as patch:
        if "openvino" not in sys.modules:
            patch.setitem(sys.modules, "openvino_telemetry", None)
        yield


def layer(
    name: str, taken: int, weight: Any, *, bias: Any = 0, multiplier: float = 1, low: int = 0, **more: Any
) -> Layer:
    """A layer with int8 weights [out, in, rows, columns], and one bias and multiplier for all channels."""
    weight, high = np.array(weight, np.int8), more.pop("high", low + 255)
    biases, multipliers = np.full(len(weight), bias, np.int32), np.full(len(weight), multiplier, np.float32)
    chosen = Requantization(1, biases, multipliers, low, high, COUNTS, COUNTS)
    return Layer(name, (taken,), weight, 8, chosen, **more)


def write(net: IntegerNet, path: Path) -> Path:
    """The net as a file."""
    model, image = qdq_graph(net), net.image
    zeros, ones = (0.0,) * image.channels, (1.0,) * image.channels
    names = tuple(map(str, range(len(net.head.weight))))
    metadata = Metadata("qdq", "net", None, names, image.size, image.size, zeros, ones)
    model.metadata_props.add(key=KEY, value=metadata.to_json())
    path.write_bytes(model.SerializeToString())
    return path


def logits(folder: Path, image: Any, *nodes: Node, classes: int = 1, **head: Any) -> list[list[float]]:
    """The logits of images [N, C, size, size], equal in both runtimes; the weights of the head are 1 by default."""
    images = np.array(image, np.uint8)
    settings: dict[str, Any] = {"gain": 1, "bias": None, "pixels": None, "scale": 1.0, **head}
    settings.setdefault("weight", np.eye(classes, dtype=np.int8))
    last = Head("head", (len(nodes),), w_bits=8, **settings)
    net = IntegerNet((Image("image", (), images.shape[1], images.shape[2]), *nodes, last))
    path = write(net, folder / "net.onnx")
    expected = run_reference(net, images) * np.float32(last.scale)
    for runtime in RUNTIMES:
        found = cnvzoo.deploy.load(path, runtime=runtime, threads=1).logits(images)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=runtime)
    return expected.tolist()


def rgb(*rows: tuple[int, int, int]) -> np.ndarray:
    """Images of one pixel."""
    return np.array(rows)[:, :, None, None]


def test_sums_are_clipped_to_0_and_255(tmp_path):
    images = rgb((0, 0, 0), (255, 255, 0), (200, 90, 0), (100, 128, 0), (3, 127, 0), (1, 255, 0))
    levels = layer("levels", 0, [[[[1]], [[0]], [[0]]]])
    summand = layer("summand", 0, [[[[0]], [[1]], [[0]]]], bias=-128, low=-128)
    expected = [[0], [255], [162], [100], [2], [128]]
    assert logits(tmp_path, images, levels, summand, Sum("sum", (2, 1))) == expected


def test_two_summands_are_added(tmp_path):
    images = rgb((0, 0, 0), (255, 0, 0), (255, 255, 0), (200, 90, 0))
    weights = np.eye(3, dtype=np.int8)[:, None, :, None, None]
    nodes = [layer(f"summand {i}", 0, weights[i], bias=-128, low=-128) for i in (0, 1)]
    assert logits(tmp_path, images, *nodes, Sum("sum", (1, 2))) == [[0], [0], [254], [34]]


def test_levels_are_rounded_half_to_even_and_clipped(tmp_path):
    """3 * x / 2 - 3 of x = 1, 2, 3, 5, 9, 100 is -1.5, 0, 1.5, 4.5, 10.5, 147."""
    node = layer("layer", 0, [[[[3]], [[0]], [[0]]]], bias=-6, multiplier=0.5, high=15)
    images = rgb(*((x, 0, 0) for x in (1, 2, 3, 5, 9, 100)))
    assert logits(tmp_path, images, node) == [[0], [0], [2], [4], [10], [15]]


@pytest.mark.parametrize(("ratio", "high"), [(1 / 17, 15), (0.5, 3), (2.0, 255)])
def test_levels_are_rounded_to_fewer_bits(tmp_path, ratio, high):
    exact = StepFunctions(np.array([ratio]), np.zeros(1), np.zeros(1, np.int64), np.full(1, 255), high)
    images = rgb(*((level, 0, 0) for level in range(256)))
    node = Rounding("rounding", (0,), requantize(exact, 1, biased=False))
    found = logits(tmp_path, images, node, weight=np.array([[1, 0, 0]], np.int8))
    assert found == [[min(round(level * ratio), high)] for level in range(256)]


def test_strides_padding_groups_and_pooling(tmp_path):
    image = np.arange(3 * 4 * 4).reshape(1, 3, 4, 4)
    depthwise = np.zeros((3, 1, 3, 3))
    depthwise[:, 0, 1, 1] = 1, 2, 0
    strided = layer("layer", 0, depthwise, groups=3, stride=(2, 2), padding=(1, 1))
    assert logits(tmp_path, image, strided, classes=12) == [[0, 2, 8, 10, 32, 36, 48, 52, 0, 0, 0, 0]]
    pooled = layer("layer", 0, depthwise, groups=3, padding=(1, 1), high=31, pooled=True)
    assert logits(tmp_path, image, pooled, classes=12) == [[5, 7, 13, 15, 31, 31, 31, 31, 0, 0, 0, 0]]


def test_linear_layers_before_and_after_convolutions(tmp_path):
    linear = layer("linear", 0, np.array([[1, 2, 0], [0, 1, 1]])[:, :, None, None], linear=True)
    again = layer("again", 1, np.array([[1, 1], [2, 0]])[:, :, None, None], linear=True)
    convolution = layer("convolution", 2, np.array([[1, 2], [0, 3]])[:, :, None, None])
    assert logits(tmp_path, rgb((1, 2, 3)), linear, again, classes=2) == [[10, 10]]
    assert logits(tmp_path, rgb((1, 2, 3)), linear, again, convolution, classes=2) == [[30, 30]]


def test_the_head_averages_pixels_and_adds_a_bias(tmp_path):
    image = np.array([[[[1, 2], [3, 4]], [[40, 30], [20, 10]], [[0, 0], [0, 0]]]])
    weight, bias = np.array([[1, -1, 0], [2, 0, 0]], np.int8), np.array([7, -1000], np.int32)
    found = logits(tmp_path, image, weight=weight, gain=3, bias=bias, pixels=4, scale=0.5)
    assert found == [[0.5 * (3 * (10 - 100) + 7), 0.5 * (60 - 1000)]]


@pytest.mark.parametrize("kind", ["residual", "separable"])
def test_networks_give_the_logits_of_their_integer_graphs(small_net, tmp_path, kind):
    """Float rounding may move a level that is near the border of two."""
    net = integer_net(small_net(kind, 4, 4), 8)
    path = write(net, tmp_path / "m.onnx")
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    images = unsaturated(images)
    expected = run_reference(net, images) * net.head.scale
    for runtime in RUNTIMES:
        found = cnvzoo.deploy.load(path, runtime=runtime, threads=1).logits(images)
        same = np.isclose(found, expected, rtol=1e-5, atol=1e-5 * expected.std()).all(1)
        assert same.mean() > 0.9, runtime


@pytest.fixture(scope="module")
def exported(make_net, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    cnvzoo.export(make_net(2, 2), path, format="qdq", dataset="cifar10")
    return path


def test_one_file_gives_the_integer_graph_in_both_runtimes(exported, make_net, noise):
    net, images = integer_net(make_net(2, 2)), unsaturated(noise(20))
    expected = run_reference(net, images) * np.float32(net.head.scale)
    for runtime in RUNTIMES:
        model = cnvzoo.deploy.load(exported, runtime=runtime, threads=1)
        np.testing.assert_allclose(model.logits(images), expected, rtol=1e-6)
        np.testing.assert_allclose(model.logits(images[:3]), expected[:3], rtol=1e-6)
        assert model.logits(images[:0]).shape == (0, 10)
        assert model.predict(list(images[:2].transpose(0, 2, 3, 1)), top=1)[0][0].index == expected[0].argmax()
        assert model.runtime(1) == runtime


def test_the_graph_is_of_standard_operators_for_old_and_new_runtimes(exported):
    model = onnx.load(exported)
    assert [(i.domain, i.version) for i in model.opset_import] == [("", 13)]
    assert {n.op_type for n in model.graph.node} == {
        "QuantizeLinear", "DequantizeLinear", "Conv", "Clip", "MaxPool", "Flatten", "Gemm",
    }  # fmt: skip
    (image,), (output,) = model.graph.input, model.graph.output
    assert image.type.tensor_type.elem_type == TensorProto.UINT8
    assert (output.name, output.type.tensor_type.elem_type) == ("logits", TensorProto.FLOAT)
    weights = {t.name: t for t in model.graph.initializer if t.name.endswith(".weight")}
    assert len(weights) == 9
    assert {t.data_type for t in weights.values()} == {TensorProto.INT8}


def test_onnx_runtime_computes_every_layer_in_integers(exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (kinds.count("QLinearConv"), kinds.count("QGemm")) == (6, 3)
    assert not {"Conv", "FusedConv", "Gemm", "DequantizeLinear", "QuantizeLinear"} & set(kinds)


@pytest.mark.parametrize("is_exact", [True, False])
def test_auto_takes_openvino_for_many_images_where_it_is_installed_and_exact(exported, noise, monkeypatch, is_exact):
    images = unsaturated(noise(16))
    monkeypatch.setattr(graphs, "sums_products_exactly", lambda: is_exact)
    model = cnvzoo.deploy.load(exported, threads=1)
    many = "openvino" if is_exact else "onnxruntime"
    assert [model.runtime(n) for n in (0, 1, 15, 16, 1000)] == ["onnxruntime"] * 3 + [many] * 2
    np.testing.assert_allclose(model.logits(images)[:15], model.logits(images[:15]), rtol=1e-6)
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = cnvzoo.deploy.load(exported, threads=1)
    assert model.runtime(1000) == "onnxruntime"
    with pytest.raises(DeployError, match=r"^runtime='openvino' needs the openvino package: pip install openvino$"):
        cnvzoo.deploy.load(exported, runtime="openvino")


def test_a_folder_called_openvino_is_not_the_package(exported, noise, monkeypatch, tmp_path):
    (tmp_path / "openvino").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "openvino").exists())])
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(graphs, "sums_products_exactly", lambda: True)
    model = cnvzoo.deploy.load(exported, threads=1)
    assert model.runtime(1000) == "onnxruntime"
    assert model.logits(noise(16).numpy()).shape == (16, 10)
    with pytest.raises(DeployError, match=r"^runtime='openvino' needs the openvino package: pip install openvino$"):
        cnvzoo.deploy.load(exported, runtime="openvino")


@pytest.mark.parametrize("fault", ["import", "start"])
def test_auto_falls_back_where_openvino_does_not_work(exported, noise, monkeypatch, tmp_path, fault):
    (tmp_path / "openvino").mkdir()
    starts = "class Core:\n    def __init__(self):\n        raise RuntimeError('no\\nplugin')\n"
    code = "raise OSError('no library')" if fault == "import" else starts
    (tmp_path / "openvino" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(graphs, "sums_products_exactly", lambda: True)
    model, images = cnvzoo.deploy.load(exported, threads=1), noise(16).numpy()
    np.testing.assert_array_equal(model.logits(images)[:15], model.logits(images[:15]))
    assert model.runtime(16) == "onnxruntime"
    with pytest.raises(DeployError) as error:
        cnvzoo.deploy.load(exported, runtime="openvino")
    assert (
        str(error.value)
        == {
            "import": "the openvino package cannot be imported: OSError: no library: install it again",
            "start": f"{exported}: OpenVINO cannot run it: no plugin",
        }[fault]
    )
    sys.modules.pop("openvino", None)


def test_auto_takes_onnx_runtime_where_fast_kernels_may_saturate(exported, monkeypatch):
    monkeypatch.setattr(graphs, "sums_products_exactly", lambda: False)
    assert cnvzoo.deploy.load(exported, threads=1).runtime(1000) == "onnxruntime"


@pytest.mark.parametrize(("kind", "is_exact", "warns"), [("qdq", False, 1), ("qdq", True, 0), ("onnx", False, 0)])
def test_openvino_by_name_warns_where_its_sums_can_saturate(make_net, monkeypatch, tmp_path, kind, is_exact, warns):
    model = make_net(2, 2) if kind == "qdq" else cnvzoo.create_model("cnv", num_classes=10)
    cnvzoo.export(model, tmp_path / "net.onnx", dataset="cifar10", format=kind)
    monkeypatch.setattr(graphs, "sums_products_exactly", lambda: is_exact)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cnvzoo.deploy.load(tmp_path / "net.onnx", runtime="openvino", threads=1)
        cnvzoo.deploy.load(tmp_path / "net.onnx", threads=1)
    found = [warning for warning in caught if "can saturate in OpenVINO" in str(warning.message)]
    assert len(found) == warns
    for warning in found:
        assert warning.filename == __file__
        assert str(warning.message).endswith("wrong scores: runtime='onnxruntime' has exact sums")


def test_runtimes_are_refused_by_name_and_by_format(exported, make_net, tmp_path):
    with pytest.raises(DeployError, match="unknown runtime 'tensorrt': auto, onnxruntime, openvino"):
        cnvzoo.deploy.load(exported, runtime="tensorrt")
    cnvzoo.export(make_net(2, 2), tmp_path / "integer.onnx", dataset="cifar10")
    with pytest.raises(DeployError, match="'integer' runs in ONNX Runtime only: export the model with format='qdq'"):
        cnvzoo.deploy.load(tmp_path / "integer.onnx", runtime="openvino")
    assert cnvzoo.deploy.load(tmp_path / "integer.onnx", threads=1).runtime(1000) == "onnxruntime"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_do_not_fit_their_metadata_are_refused(exported, tmp_path, runtime):
    model = onnx.load(exported)
    entry = model.metadata_props[0]
    entry.value = entry.value.replace('"size": 32', '"size": 40')
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(DeployError, match=r"its input is not tensor\(uint8\) \['N', 3, 40, 40\]"):
        cnvzoo.deploy.load(tmp_path / "other.onnx", runtime=runtime)


def test_openvino_names_the_file_that_it_cannot_run(exported, tmp_path):
    model = onnx.load(exported)
    model.graph.node[-1].op_type = "Unheard"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(DeployError, match=r"other.onnx: OpenVINO cannot run it: .*Unheard"):
        cnvzoo.deploy.load(tmp_path / "other.onnx", runtime="openvino")


FREED_IN_A_THREAD = """
import os, signal, sys, threading
import cnvzoo_runtime
sys.modules["openvino_telemetry"] = None
models = [cnvzoo_runtime.load(sys.argv[1], runtime="openvino", threads=1)]
thread = threading.Thread(target=models.clear)
thread.start()
thread.join()
caught = []
signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
os.kill(os.getpid(), signal.SIGINT)
print(caught)
"""


def test_a_signal_after_openvino_freed_a_model_in_another_thread_is_handled(exported):
    """OpenVINO leaves an unmapped signal stack behind when its Core is freed there: this was a segmentation fault."""
    command = [sys.executable, "-c", FREED_IN_A_THREAD, str(exported)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[2]"), done.stderr


def test_float_models_are_refused(tmp_path):
    with pytest.raises(DeployError, match="is for quantized models"):
        cnvzoo.export(cnvzoo.create_model("cnv"), tmp_path / "m.onnx", format="qdq", dataset="cifar10")


def test_a_loaded_file_has_no_accumulators(exported, noise):
    model: DeployedModel = cnvzoo.deploy.load(exported, threads=1)
    with pytest.raises(DeployError, match="'qdq' has logits, not accumulators"):
        model.accumulators(noise(2).numpy())
