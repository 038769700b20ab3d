"""Integer graphs of ResNets and MobileNets: ONNX Runtime, the reference implementation and PyTorch compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from brevitas.nn import QuantIdentity, QuantReLU
from torch import nn

import cnvzoo
import cnvzoo.deploy
from cnvzoo.deploy import DeployError
from cnvzoo.deploy.integer import Image, Layer, Rounding, Sum
from cnvzoo.deploy.integer_onnx import integer_graph
from cnvzoo.deploy.lowering import integer_net
from cnvzoo.deploy.reference import apply, run_reference
from cnvzoo.models.quant import ResidualQuantReLU, quantizer_of
from cnvzoo.models.quant_layers import QuantLayers


def session(model: nn.Module, size: int, optimized: str = "") -> onnxruntime.InferenceSession:
    """As on CPUs without VNNI, for which ONNX Runtime rewrites the weights."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = optimized
    content = integer_graph(integer_net(model, size)).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def images_of(size: int, count: int = 6) -> torch.Tensor:
    """uint8 noise, the first image black, the second white."""
    images = torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    return images


@pytest.mark.parametrize("kind", ["residual", "separable"])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (2, 2), (1, 1), (3, 8)])
def test_runtime_equals_reference_bit_for_bit(small_net, kind, w_bits, a_bits):
    model = small_net(kind, w_bits, a_bits)
    images = images_of(8, 60).numpy()
    found = np.asarray(session(model, 8).run(["accumulators"], {"image": images})[0])
    np.testing.assert_array_equal(found, run_reference(integer_net(model, 8), images))
    assert len(np.unique(found)) > 20


class Perceptron(nn.Module):
    """Without convolutions, for images of 8x8."""

    def __init__(self, num_classes: int, in_chans: int, w_bits: int, a_bits: int) -> None:
        super().__init__()
        layers = QuantLayers(w_bits, a_bits, 8)
        self.input, self.flatten = layers.input(), nn.Flatten()
        self.fc1, self.norm = layers.linear(64 * in_chans, 12, last=False), nn.BatchNorm1d(12)
        self.relu, self.fc2 = layers.relu(), layers.linear(12, num_classes, last=True)
        layers.finish(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.relu(self.norm(self.fc1(self.flatten(self.input(x))))))


def test_a_network_without_convolutions_is_exported(tmp_path):
    @cnvzoo.register_model("perceptron", summary="for a test", quantized=True, input_size=8)
    def build(num_classes: int, in_chans: int, w_bits: int, a_bits: int) -> nn.Module:
        return Perceptron(num_classes, in_chans, w_bits, a_bits)

    try:
        model = cnvzoo.create_model("perceptron", w_bits=4, a_bits=4, num_classes=3, in_chans=1)
        model.train()(torch.rand(64, 1, 8, 8))
        model.preprocessing = cnvzoo.Preprocessing(8, (0.0,), (1.0,))
        images = images_of(8, 20)[:, :1].contiguous()
        expected = model.eval()(images / 255)
        for file, format in (("m.onnx", "integer"), ("q.onnx", "qdq"), ("m.c", "c")):
            cnvzoo.export(model, tmp_path / file, format=format)
        for file in ("m.onnx", "q.onnx"):
            logits = cnvzoo.deploy.load(tmp_path / file, runtime="onnxruntime").logits(images.numpy())
            np.testing.assert_allclose(logits, expected.detach().numpy(), atol=0.05)
    finally:
        cnvzoo.unregister_model("perceptron")


@pytest.mark.parametrize(("name", "bits"), [("quant_resnet20", 4), ("quant_mobilenet_v1", 2)])
def test_files_of_the_registrys_models_give_pytorchs_logits(registered_net, tmp_path, name, bits):
    model = copy.deepcopy(registered_net(name, bits))
    cnvzoo.quantize_bias(model)
    facts = cnvzoo.export(model, tmp_path / "m.onnx", dataset="cifar10")
    assert (facts.w_bits, facts.a_bits, facts.size) == (bits, bits, 32)
    deployed, images = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1), images_of(32)
    np.testing.assert_array_equal(
        deployed.accumulators(images.numpy()), run_reference(integer_net(model), images.numpy())
    )
    with torch.no_grad():
        expected = model(images / 255).numpy()
    same = np.isclose(deployed.logits(images.numpy()), expected, rtol=1e-4, atol=1e-4 * expected.std()).all(1)
    assert same.sum() >= 5  # float32 sums may round an activation to the other side


@pytest.mark.parametrize("kind", ["residual", "separable"])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (2, 2)])
def test_levels_are_those_of_the_trained_model(small_net, kind, w_bits, a_bits):
    """Node by node, each given PyTorch's own levels, so that differences do not add up."""
    model = small_net(kind, w_bits, a_bits)
    cnvzoo.quantize_bias(model)
    expected, hooks = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantReLU, QuantIdentity)) and name != "input":
            scale = quantizer_of(layer).effective_scale()
            hooks.append(layer.register_forward_hook(lambda _m, _i, out, s=scale: expected.append((out / s).round())))
    images, net = images_of(8, 16), integer_net(model, 8)
    with torch.no_grad():
        logits = model(images / 255).numpy()
    for hook in hooks:
        hook.remove()
    given, wrong, total = [], 0, 0
    for node in net.nodes[:-1]:
        found = images.numpy() if isinstance(node, Image) else apply(node, *(given[i] for i in node.inputs))
        if isinstance(node, (Rounding, Sum)) or (isinstance(node, Layer) and node.requantization.low == 0):
            wanted = expected.pop(0).numpy().astype(np.int16)
            wrong, total = wrong + (found != wanted).sum(), total + found.size
            found = wanted
        given.append(found)
    assert not expected
    assert wrong <= 1e-4 * total
    np.testing.assert_allclose(
        apply(net.head, given[-1]) * net.head.scale, logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max()
    )


def test_no_accumulator_differs_with_quantized_biases(small_net):
    model = small_net("residual", 4, 4)
    cnvzoo.quantize_bias(model)
    net = integer_net(model, 8)
    kinds = [type(node).__name__ for node in net.nodes]
    assert [kinds.count(kind) for kind in ("Image", "Layer", "Rounding", "Sum", "Head")] == [1, 10, 4, 4, 1]
    assert net.differing <= 1e-5 * net.reachable
    assert not any(node.requantization.differing.any() for node in net.nodes if isinstance(node, Rounding))
    assert net.reachable > 4 * 256


def test_the_bias_of_the_head_is_whole_for_images_of_any_size(small_net):
    model: Any = small_net("residual", 4, 4)
    with torch.no_grad():
        model.fc.bias.normal_()
    before = model.fc.bias.detach().clone()
    cnvzoo.quantize_bias(model)
    once = model.fc.bias.detach().clone()
    unit = quantizer_of(model.fc).effective_scale() * quantizer_of(model.stages[-1].relu).effective_scale() / 18
    assert (before - once).abs().max() <= unit / 2 * 1.001
    assert not torch.equal(before, once)
    for size, pixels in ((8, 16), (12, 36)):
        head = integer_net(model, size).head
        assert (head.pixels, head.gain) == (pixels, 18)
        assert head.bias is not None
        assert not (head.bias % pixels).any()
        np.testing.assert_allclose(head.bias * head.scale, once.numpy(), rtol=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(4, 150_000), (2, 85_000)])
def test_the_file_of_a_resnet20_is_small(registered_net, tmp_path, bits, most):
    cnvzoo.export(registered_net("quant_resnet20", bits), tmp_path / "m.onnx", dataset="cifar10")
    assert (tmp_path / "m.onnx").stat().st_size <= most


def test_onnxruntime_adds_integers_without_float_tensors(small_net, tmp_path):
    """It fuses the operators of a sum, and unpacks the weights when it loads a file."""
    session(small_net("residual", 4, 8), 8, str(tmp_path / "optimized.onnx"))
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearAdd") == 4
    assert not {"DequantizeLinear", "QuantizeLinear", "Add", "Gather", "Split", "Expand", "Cast"} & set(kinds) - {"Add"}
    assert kinds.count("Add") == 1  # the bias of the head


def replace_layer(name: str, layer: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda model: model.set_submodule(name, layer())


def with_a_sum_of_4_bits(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, ResidualQuantReLU):
            quantizer_of(layer).set_bits(4)


def with_bias(model: Any) -> None:
    model.stages[0][0].conv1.bias = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_layer("stages.0.0.conv2", lambda: nn.Conv2d(4, 4, 3, padding=1)), "conv2: Conv2d cannot be expressed"),
        (replace_layer("stages.0.0.norm1", nn.ReLU), r"stages.0.0.norm1: ReLU cannot be expressed .* has a BatchNorm"),
        (replace_layer("stages.1.0.relu", nn.ReLU), "stages.1.0.relu: ReLU cannot be .* has a quantized ReLU here"),
        (replace_layer("norm", lambda: nn.BatchNorm2d(4, affine=False)), "norm: must have a weight, a bias and"),
        (with_a_sum_of_4_bits, r"^stages\.0\.relu: sums have 8 bits in the integer graph: give its quantizer 8 bits$"),
        (with_bias, "stages.0.0.conv1: has a bias; in the integer graph only BatchNorm and the last layer"),
        (replace_layer("fc", nn.Identity), "flatten: the last layer must be linear"),
    ],
)
def test_a_layer_that_cannot_be_expressed_is_named(small_net, change, message):
    model = small_net("residual", 2, 2)
    change(model)
    with pytest.raises(DeployError, match=message):
        integer_net(model, 8)


def test_a_model_that_is_more_than_layers_is_refused(small_net):
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_net("residual", 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) * 2

    with pytest.raises(DeployError, match=r"the integer graph cannot express this model: Doubled calls .*mul"):
        integer_net(Doubled(), 8)


def test_sums_over_pixels_that_may_leave_int32_are_refused(small_net):
    with pytest.raises(DeployError, match="fc: its accumulators may leave int32: use smaller images"):
        integer_net(small_net("residual", 8, 8), 2048)


def test_integer_weights_are_in_the_order_of_execution(small_net):
    """The shortcut of a block runs before its second convolution, and is a later module."""
    names = list(cnvzoo.integer_weights(small_net("residual", 2, 2)))
    assert names[-7:] == [
        "stages.0.1.conv2", "stages.1.0.conv1", "stages.1.0.shortcut.0", "stages.1.0.conv2", "stages.1.1.conv1",
        "stages.1.1.conv2", "fc",
    ]  # fmt: skip
