"""The integer graph: ONNX Runtime, the reference implementation and PyTorch compute the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from brevitas.nn import QuantReLU
from onnx import numpy_helper
from torch import nn

import cnvzoo
import cnvzoo.deploy
from cnvzoo.deploy import DeployError
from cnvzoo.deploy.graph_builder import pack_by_table
from cnvzoo.deploy.integer_onnx import integer_graph
from cnvzoo.deploy.lowering import integer_net
from cnvzoo.deploy.reference import run_reference
from cnvzoo.deploy.requantize import StepFunctions, _exact_steps, _search, requantize
from cnvzoo.models.quant import quantizer_of


@pytest.mark.parametrize(("w_bits", "a_bits", "in_chans"), [(8, 8, 3), (4, 4, 3), (2, 2, 1), (1, 1, 3)])
def test_runtime_equals_reference_bit_for_bit(make_net, noise, tmp_path, w_bits, a_bits, in_chans):
    model = make_net(w_bits, a_bits, in_chans)
    cnvzoo.export(model, tmp_path / "m.onnx", dataset="cifar10" if in_chans == 3 else "mnist")
    images = noise(9, in_chans).numpy()
    found = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1).accumulators(images)
    np.testing.assert_array_equal(found, run_reference(integer_net(model), images))
    assert len(np.unique(found)) > 20


@pytest.mark.parametrize("bits", [2, 4])
def test_levels_are_those_of_the_trained_model(make_net, noise, bits):
    """Layer by layer, each given PyTorch's own levels, so that differences do not add up."""
    model, net = make_net(bits, bits), integer_net(make_net(bits, bits))
    levels, hooks = [], []
    for layer in model.modules():
        if isinstance(layer, QuantReLU):
            scale = quantizer_of(layer).effective_scale()
            hooks.append(layer.register_forward_hook(lambda _m, _i, out, s=scale: levels.append((out / s).round())))
    images = noise(16)
    with torch.no_grad():
        model(images / 255)
    for hook in hooks:
        hook.remove()
    wrong = total = 0
    x = images
    for layer, expected in zip(net.layers, levels, strict=True):
        if layer.linear:
            x = x.flatten(1)[:, :, None, None]
        chosen = layer.requantization
        acc = nn.functional.conv2d(x.double(), torch.from_numpy(layer.weight).double() * chosen.gain)
        acc = acc + torch.from_numpy(chosen.bias)[:, None, None]
        found = (acc.float() * torch.from_numpy(chosen.multiplier)[:, None, None]).round().clamp(0, chosen.high)
        wrong += int((found != expected.reshape(found.shape)).sum())
        total += found.numel()
        x = expected
        if layer.pooled:
            x = nn.functional.max_pool2d(x, 2)
    assert wrong <= 1e-4 * total


@pytest.mark.parametrize("bits", [2, 4])
def test_no_accumulator_differs_with_quantized_biases(make_net, bits):
    """At 2 bits none differs before either: a bias and a multiplier can place three steps anywhere."""
    model = copy.deepcopy(make_net(bits, bits))
    before = integer_net(model)
    cnvzoo.quantize_bias(model)
    assert (before.differing > 0) == (bits == 4)
    assert integer_net(model).differing == 0


def test_few_accumulators_differ_with_quantized_biases_at_8_bits(make_net):
    """Those left are due to rounding to float32."""
    model = copy.deepcopy(make_net(8, 8))
    before = integer_net(model)
    cnvzoo.quantize_bias(model)
    assert 0 < integer_net(model).differing < 0.01 * before.differing


def test_logits_of_a_2_bit_network_are_those_of_pytorch(make_net, noise, tmp_path):
    model = make_net(2, 2)
    facts = cnvzoo.export(model, tmp_path / "m.onnx", dataset="cifar10")
    images = noise(64)
    with torch.no_grad():
        expected = model(images / 255).numpy()
    found = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1).logits(images.numpy())
    same = np.isclose(found, expected, rtol=1e-4, atol=facts.scale / 2).all(1)
    assert same.mean() > 0.9


@pytest.mark.parametrize(("bits", "most"), [(8, 1_600_000), (4, 850_000), (2, 470_000)])
def test_the_file_is_smaller_with_fewer_bits(make_net, tmp_path, bits, most):
    cnvzoo.export(make_net(bits, bits), tmp_path / "m.onnx", dataset="cifar10")
    assert (tmp_path / "m.onnx").stat().st_size <= most


def test_channels_with_a_constant_level_leave_1_bit_weights_packed(tmp_path):
    """They have weights of zero, a third value: with it 5 weights fit in a byte instead of 8."""
    model = cnvzoo.create_model("quant_cnv", w_bits=1, a_bits=8).eval()
    sizes = []
    for dead in (False, True):
        with torch.no_grad():
            for norm in (m for m in model.modules() if dead and isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))):
                norm.weight[-1] = 0
        cnvzoo.export(model, tmp_path / f"{dead}.onnx", dataset="cifar10")
        sizes.append((tmp_path / f"{dead}.onnx").stat().st_size)
    places = 4 * (2 * 64 + 2 * 128 + 2 * 256 + 2 * 512)  # an int32 for each channel of a hidden layer
    assert sizes[0] < sizes[1] <= sizes[0] + places + 8 * 512


def test_a_1_bit_layer_without_any_channel_in_use_is_exported(tmp_path, noise):
    model = cnvzoo.create_model("quant_cnv", w_bits=1, a_bits=2).eval()
    nn.init.zeros_(model.get_submodule("features.4").get_parameter("weight"))  # gamma
    cnvzoo.export(model, tmp_path / "m.onnx", dataset="cifar10")
    images = noise(3).numpy()
    found = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1).accumulators(images)
    np.testing.assert_array_equal(found, run_reference(integer_net(model), images))


def test_requantization_to_2_bits_is_exact_for_every_accumulator():
    rng = np.random.default_rng(0)
    multiplier, offset = rng.uniform(1e-3, 0.5, 200), rng.normal(0, 3, 200)
    low, high = np.full(200, -900), np.full(200, 1100)
    exact = StepFunctions(multiplier, offset, low, high, 3)
    chosen = requantize(exact, 127)
    assert not chosen.differing.any()
    acc = np.arange(-900, 1101)[None, :]
    expected = np.clip(np.rint(multiplier[:, None] * acc + offset[:, None]), 0, 3)
    product = (127 * acc + chosen.bias[:, None]).astype(np.float32) * chosen.multiplier[:, None]
    np.testing.assert_array_equal(np.clip(np.rint(product), 0, 3), expected)


def test_differing_accumulators_are_counted():
    """As by brute force over all accumulators; with gain 1, integer biases are coarse."""
    rng = np.random.default_rng(1)
    multiplier, offset = rng.uniform(0.01, 0.05, 20), rng.normal(0, 9, 20)
    exact = StepFunctions(multiplier, offset, np.full(20, -9000), np.full(20, 9000), 255)
    chosen = requantize(exact, 1)
    acc = np.arange(-9000, 9001)[None, :]
    expected = np.clip(np.rint(multiplier[:, None] * acc + offset[:, None]), 0, 255)
    product = (acc + chosen.bias[:, None]).astype(np.float32) * chosen.multiplier[:, None]
    found = np.clip(np.rint(product), 0, 255)
    np.testing.assert_array_equal((found != expected).sum(1), chosen.differing)
    assert chosen.differing.sum() > 0
    assert np.abs(found - expected).max() == 1
    np.testing.assert_array_equal(chosen.reachable, 18001)


def test_steps_are_found_from_any_start_with_few_evaluations():
    rng = np.random.default_rng(3)
    low, high = rng.integers(-3000, 0, 40), rng.integers(0, 3000, 40)
    wanted = np.clip(rng.integers(-3500, 3500, (40, 5)), low[:, None], high[:, None] + 1)
    exact = StepFunctions(np.zeros(40), np.zeros(40), low, high, 5)
    evaluations = 0

    def reached(acc):
        nonlocal evaluations
        evaluations += 1
        return acc >= wanted

    starts = [*(wanted + off for off in (-2.5, -1.0, 0.0, 0.5, 3.0)), *(np.full((40, 5), x) for x in (-np.inf, np.nan))]
    for start in starts:
        np.testing.assert_array_equal(_search(start, exact, reached), wanted)
    assert evaluations < 100


def test_a_channel_halfway_between_two_levels_for_every_input():
    """As with gamma 0 and a beta of 1.5 scales; round(1.5) is 2, so that the first accumulator has reached it."""
    exact = StepFunctions(np.zeros(1), np.array([1.5]), np.array([-(1 << 24)]), np.array([1 << 24]), 3)
    assert _exact_steps(exact).tolist() == [[-(1 << 24), -(1 << 24), (1 << 24) + 1]]


@pytest.mark.parametrize(("low", "high"), [(0, 15), (-128, 127), (0, 255)])
@pytest.mark.parametrize("gain", [1, 1024])
def test_channels_whose_level_hardly_depends_on_the_input(gain, low, high):
    """Their bias would exceed int32: the offset needs another multiplier than the accumulators have."""
    offset = np.array([1.7, 0.3, 14.9, -2.6, 0.0, 100.2, -100.7, 1.7, 0.49])
    multiplier = np.array([0.0] * 7 + [1e-9, 1e-13])
    ends = np.full(len(offset), 2000)
    exact = StepFunctions(multiplier, offset, -ends, ends, high, low)
    found = requantize(exact, gain)
    assert not found.differing.any()
    assert found.fits_int32(exact)
    accumulators = np.arange(-2000.0, 2001.0)[:, None]
    np.testing.assert_array_equal(
        found.levels((gain * accumulators).astype(np.int64)), exact.clipped(multiplier * accumulators + offset)
    )


@pytest.mark.parametrize(("values", "per_byte"), [([-1, 1], 8), ([-1, 0, 1], 5), (range(-7, 8), 2)])
def test_unpacked_weights_are_those_that_were_packed(values, per_byte):
    weight = np.random.default_rng(0).choice(np.array(values, np.int8), (7, 3, 3, 3))
    packed = pack_by_table(weight)
    assert packed is not None
    content, table = packed
    assert content.size == -(-weight.size // per_byte)
    np.testing.assert_array_equal(table[content].reshape(-1)[: weight.size], weight.reshape(-1))


@pytest.mark.parametrize("w_bits", [1, 2])
def test_onnxruntime_unpacks_weights_when_it_loads_a_file(make_net, tmp_path, w_bits):
    """So a session is as fast as with int8 weights in the file."""
    model = make_net(w_bits, 2)
    cnvzoo.export(model, tmp_path / "m.onnx", dataset="cifar10")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    stored, loaded = (onnx.load(tmp_path / name).graph for name in ("m.onnx", "optimized.onnx"))
    kinds = {node.op_type for node in stored.node}
    assert "Gather" in kinds
    assert ("Pad" in kinds) == (w_bits == 1)  # the channels of zeros, which 1-bit weights leave out
    assert not {"Gather", "Pad", "Cast", "Reshape", "Slice"} & {node.op_type for node in loaded.node}
    weights = {c.name: numpy_helper.to_array(c) for c in loaded.initializer}
    for layer, node in zip(
        integer_net(model).layers, (n for n in loaded.node if n.op_type == "QLinearConv"), strict=True
    ):
        np.testing.assert_array_equal(weights[node.input[3]], layer.scaled_weight)


def test_eight_bit_weights_are_not_packed():
    assert pack_by_table(np.arange(-127, 128, dtype=np.int8)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.features.__setitem__(2, nn.ReLU()), "features.2: ReLU cannot be expressed"),
        (lambda m: m.features.__setitem__(0, nn.Conv2d(3, 64, 3)), "features.0: Conv2d cannot be expressed"),
        (lambda m: m.features.__setitem__(6, nn.MaxPool2d(3)), "features.6: only 2x2 max pooling"),
        (lambda m: m.features.__setitem__(6, nn.MaxPool2d(2, dilation=2)), "features.6: max pooling with dilation"),
        (lambda m: m.features.__setitem__(2, QuantReLU(bit_width=2)), "features.2: not a quantizer of cnvzoo"),
        (lambda m: setattr(m.features[0], "dilation", (2, 2)), "features.0: only convolutions without dilation"),
        (lambda m: m.features[1].bias.data.fill_(float("nan")), r"features.1.bias: not finite"),
    ],
)
def test_a_layer_that_cannot_be_expressed_is_named_and_nothing_is_written(make_net, tmp_path, change, message):
    model = copy.deepcopy(make_net(2, 2))
    change(model)
    with pytest.raises(DeployError, match=message):
        cnvzoo.export(model, tmp_path / "m.onnx", dataset="cifar10")
    assert not list(tmp_path.iterdir())


def test_a_layer_may_be_called_head(make_net):
    net = integer_net(make_net(2, 2))
    nodes = (net.nodes[0], replace(net.nodes[1], name="head"), *net.nodes[2:])
    names = [tensor.name for tensor in integer_graph(replace(net, nodes=nodes)).graph.initializer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "message"), [("cnv", "this CNV is a float model"), ("resnet20", "this ResNet is a float model")]
)
def test_float_models_are_refused(tmp_path, name, message):
    with pytest.raises(DeployError, match=message):
        cnvzoo.export(cnvzoo.create_model(name), tmp_path / "m.onnx", dataset="cifar10")
    assert not list(tmp_path.iterdir())
