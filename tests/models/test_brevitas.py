"""Integers and scales of a quantized model, through this library and through Brevitas' own calls and exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

import cnvzoo
from cnvzoo.models.quant_layers import QuantLayers


@pytest.fixture(autouse=True)
def plain(uncompiled: None) -> None:
    """Compile no loops."""


def linear(w_bits: int, *, last: bool = False) -> Any:
    """A linear layer with known weights, [3, 2], and scales: 0.1 and two times 0.5, or 0.1 in all."""
    layer: Any = QuantLayers(w_bits, 4, 8).linear(2, 3, last=last)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.26, -0.74], [9.0, -9.0], [0.0, -0.26]]))
        layer.weight_quant.tensor_quant.scale.copy_(torch.tensor(0.1) if last else torch.tensor([[0.1], [0.5], [0.5]]))
    return layer


def net(w_bits: int, a_bits: int) -> Any:
    """A model that has seen noise."""
    torch.manual_seed(0)
    model = cnvzoo.create_model("quant_cnv", w_bits=w_bits, a_bits=a_bits)
    model(torch.rand(16, 3, 32, 32))
    return model.eval()


def images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1)) / 255


INTEGERS = pytest.mark.parametrize(
    ("w_bits", "expected"),
    [
        (8, [[3, -7], [18, -18], [0, -1]]),
        (4, [[3, -7], [7, -7], [0, -1]]),
        (2, [[1, -1], [1, -1], [0, -1]]),
        (1, [[1, -1], [1, -1], [1, -1]]),
    ],
)
EXPORTERS_WARN = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:fast_hadamard:UserWarning"
)


@INTEGERS
def test_integer_weights_are_the_rounded_weights(w_bits: int, expected: list[list[int]]) -> None:
    (name, found), *others = cnvzoo.integer_weights(nn.Sequential(nn.ReLU(), linear(w_bits))).items()
    assert (name, others, found.bits) == ("1", [], w_bits)
    assert (found.values.dtype, found.scale.dtype) == (torch.int8, torch.float32)
    assert found.values.tolist() == expected
    assert torch.equal(found.scale, torch.tensor([[0.1], [0.5], [0.5]]))
    assert cnvzoo.integer_weights(linear(w_bits, last=True))[""].scale.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_weights_times_their_scales_are_what_the_layers_compute_with(dtype: torch.dtype) -> None:
    model = net(4, 4).to(dtype)
    found = cnvzoo.integer_weights(model)
    assert list(found) == [
        *(f"features.{n}" for n in (0, 3, 7, 10, 14, 17)), *(f"classifier.{n}" for n in (0, 3, 6)),
    ]  # fmt: skip
    assert [weight.bits for weight in found.values()] == [8] + [4] * 8
    last = model.classifier[6]
    x = torch.eye(last.in_features, dtype=dtype)
    values, scale, _ = found["classifier.6"]
    assert torch.equal(last(x), (values * scale).T.to(dtype))


def test_integer_weights_of_a_wrapped_model_have_the_names_of_the_model() -> None:
    model = nn.Sequential(linear(4))
    wrappers: list[Any] = [torch.compile(model), nn.DataParallel(model)]
    for wrapped in wrappers:
        assert list(cnvzoo.integer_weights(wrapped)) == ["0"]


def test_integer_weights_are_copies() -> None:
    layer = linear(4)
    (found,) = cnvzoo.integer_weights(layer).values()
    nn.init.zeros_(layer.weight_quant.tensor_quant.scale)
    assert torch.equal(found.scale, torch.tensor([[0.1], [0.5], [0.5]]))


def test_models_without_integer_weights_are_refused() -> None:
    with pytest.raises(cnvzoo.ModelError, match=r"CNV has no quantized layer: quantize it \(cnvzoo.quantize\)"):
        cnvzoo.integer_weights(cnvzoo.create_model("cnv"))
    layer = linear(4)
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(cnvzoo.ModelError, match=r"^0: its weight has values that are not finite"):
        cnvzoo.integer_weights(nn.Sequential(layer))


@INTEGERS
def test_quant_weight_gives_the_integers(w_bits: int, expected: list[list[int]]) -> None:
    quantized = linear(w_bits).quant_weight()
    assert isinstance(quantized, IntQuantTensor)
    assert quantized.int().tolist() == expected
    assert torch.equal(quantized.scale, torch.tensor([[0.1], [0.5], [0.5]]))
    assert (float(quantized.zero_point), float(quantized.bit_width), quantized.signed) == (0, w_bits, True)


def test_proxies_know_their_scales_and_bit_widths() -> None:
    model = net(4, 3)
    relu, weight = model.features[2].act_quant, model.features[3].weight_quant
    name = "features.2.act_quant.fused_activation_quant_proxy.tensor_quant.scale"
    assert torch.equal(relu.scale(), model.state_dict()[name])
    assert (float(relu.zero_point()), float(relu.bit_width()), relu.is_signed) == (0, 3, False)
    assert torch.equal(model.input.act_quant.scale(), torch.tensor(1 / 255))
    assert (weight.scale().shape, float(weight.bit_width())) == ((64, 1, 1, 1), 4)


def test_a_layer_gives_a_quant_tensor_if_told_to() -> None:
    relu = net(4, 3).features[2]
    x = torch.linspace(-1, 5, 7)
    plain = relu(x)
    relu.return_quant_tensor = True
    quantized = relu(x)
    assert (type(plain), type(quantized)) == (Tensor, IntQuantTensor)
    assert torch.equal(quantized.value, plain)


def test_a_disabled_quantizer_leaves_the_weights_alone() -> None:
    layer = linear(4)
    layer.weight_quant.disable_quant = True
    assert torch.equal(layer(torch.eye(2)), layer.weight.T)


@EXPORTERS_WARN
@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 4), (2, 3)])
def test_brevitas_writes_qcdq_that_computes_the_same(tmp_path: Path, w_bits: int, a_bits: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from brevitas.export import export_onnx_qcdq

    model, path = net(w_bits, a_bits), tmp_path / "m.onnx"
    export_onnx_qcdq(model, args=images(2), export_path=str(path), opset_version=13, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images(2).numpy()})
    assert_same(logits, model)


@EXPORTERS_WARN
@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 4), (1, 2)])
def test_brevitas_writes_qonnx_that_computes_the_same(tmp_path: Path, w_bits: int, a_bits: int) -> None:
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    from brevitas.export import export_qonnx
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    model, path = net(w_bits, a_bits), tmp_path / "m.onnx"
    export_qonnx(model, args=images(2), export_path=str(path), opset_version=13, dynamo=False)
    written = cleanup_model(wrapper.ModelWrapper(str(path)))
    found = execute_onnx(written, {written.graph.input[0].name: images(2).numpy()})
    assert_same(found[written.graph.output[0].name], model)


@torch.no_grad()
def assert_same(logits: np.ndarray, model: nn.Module) -> None:
    """The sums of another runtime may move single activations to the next level, which changes logits a little."""
    expected = model(images(2)).numpy()
    assert np.abs(logits - expected).max() <= 0.1 * expected.std()
