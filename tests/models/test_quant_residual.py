"""Quantized residual additions: integers are added on one scale, in training fused with the BatchNorm before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cnvzoo.models import build_model, compiled
from cnvzoo.models.fake_quant import IntRange
from cnvzoo.models.norm_act import NormAct, QuantizedResidualActivation, block_inputs, norm_act
from cnvzoo.models.quant import IntQuantizer, PlainQuantIdentity, ResidualQuantReLU, act_quant, quantizer_of
from cnvzoo.models.quant_layers import QuantLayers, start_from_float
from cnvzoo.models.residual import add_fake_quantized

CHANNELS = 6
SHAPE = (5, CHANNELS, 26, 24)  # large enough to be compiled
SCALE = 0.016  # 127 of it is 2: some of N(1, 1) is clamped


class Quantizer(nn.Module):
    """A scale whose gradient is neither divided nor limited."""

    def __init__(self) -> None:
        super().__init__()
        self.ints = IntRange.of(8, signed=False)
        self.scale = nn.Parameter(torch.tensor(SCALE))

    def positive_scale(self, x: Tensor) -> Tensor:
        return self.scale


class AddedReLU(QuantizedResidualActivation):
    def __init__(self) -> None:
        super().__init__()
        self.own = Quantizer()
        self.activation_quantizer = self.own

    def forward(self, x: Tensor, residual: Tensor, *, rounded: bool) -> Tensor:
        return add_fake_quantized(x, residual, self.own.scale, 255, rounded)


def summand(z: Tensor, scale: Tensor) -> Tensor:
    """z rounded and clamped to -128..127 times scale, with the gradient of z; that of the scale is of the rounding."""
    v = (z / scale).detach()
    rounded = v.round()
    clamped = rounded.clamp(-128, 127)
    return z + scale * (rounded - v) + ((clamped - rounded) * scale).detach()


def reference(z: Tensor, residual: Tensor, scale: Tensor, rounded: bool) -> Tensor:
    """The sum in float64, by torch's autograd. A residual that was rounded before is a number like any other."""
    first = summand(z, scale)
    if rounded:
        second = residual + ((residual / scale).round() * scale - residual).detach()
    else:
        second = summand(residual, scale)
    total = ((first + second) / scale).detach().round()
    return torch.where(total <= 0, 0.0, torch.where(total >= 255, 255 * scale, first + second))


def tensors(dtype: torch.dtype, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and the gradient of the result, in channels_last."""
    generator = torch.Generator().manual_seed(0)
    x, upstream, residual = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    if rounded:
        residual = torch.randint(256, SHAPE, generator=generator) * SCALE
    x, residual, upstream = 1.5 * x + 0.5, residual * (1 if rounded else 2), upstream
    x, residual, upstream = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, residual, upstream))
    return x, residual, upstream


def norm_of(dtype: torch.dtype = torch.float32) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.8, 1.4, CHANNELS))
        norm.bias.copy_(torch.linspace(0.3, 1.5, CHANNELS))
    return norm.to(dtype)


def step(kind: str, dtype: torch.dtype, rounded: bool) -> dict[str, Tensor]:
    """Output and gradients of one training step: in float64, layer by layer, or fused."""
    x, residual, upstream = tensors(dtype, rounded)
    act, norm = AddedReLU(), norm_of(torch.float64 if kind == "float64" else torch.float32)
    scale: Any = act.own.scale
    if kind == "float64":
        x, residual, upstream = x.double(), residual.double(), upstream.double()
        scale = scale.detach().double().requires_grad_()
    x, residual = x.requires_grad_(), residual.requires_grad_()
    if kind == "float64":
        output = reference(norm(x), residual, scale, rounded)
    elif kind == "layers":
        output = act(norm(x), residual, rounded=rounded)
    else:
        output = norm_act(x, norm, act, residual=residual, rounded=rounded)
    output.backward(upstream)
    found = {"output": output, "x": x.grad, "residual": residual.grad, "scale": scale.grad}
    found |= {"gamma": norm.weight.grad, "beta": norm.bias.grad}
    assert all(tensor is not None for tensor in found.values())
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


@pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning")
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("layers", torch.float32),
        pytest.param(
            "fused", torch.float32,
            marks=pytest.mark.skipif(not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here"),
        ),
        pytest.param(
            "fused", torch.bfloat16,
            marks=pytest.mark.skipif(not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here"),
        ),
    ],
)  # fmt: skip
def test_a_training_step_is_that_of_straight_through_rounding(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, rounded: bool
) -> None:
    expected = step("float64", dtype, rounded)
    integers = (expected["output"] / SCALE).round()
    fused: list[Any] = []
    original = NormAct.apply
    monkeypatch.setattr(NormAct, "apply", lambda *args: (fused.append(args), original(*args))[1])
    found = step(kind, dtype, rounded)
    assert len(fused) == (kind == "fused")
    assert (integers == 0).double().mean() > 0.01
    # of two summands that are clamped to 127, the sum is never above 254
    assert ((integers == 255).double().mean() > 0.05) == rounded
    rounding = torch.finfo(dtype).eps
    for name in ("output", "x", "residual"):
        assert found[name].dtype == dtype
        size = expected[name].abs() + expected[name].abs().mean()
        off = (found[name].double() - expected[name]).abs() > max(2 * rounding, 1e-4) * size
        assert off.double().mean() < 5e-4, name  # rounding may move a value across a threshold
    for name in ("gamma", "beta", "scale"):
        spread = float(expected[name].abs().max())
        torch.testing.assert_close(
            found[name], expected[name], rtol=2e-3, atol=2e-3 * spread, check_dtype=False, msg=name
        )


def test_sums_of_integers() -> None:
    """Each summand is clamped to -128..127, a rounded one to nothing, and the sum to 0..255."""
    first = torch.tensor([3.0, 127.0, 200.0, 200.0, -200.0, -200.0, 2.5, 3.5, -4.0, 0.4, -1.0])
    second = torch.tensor([4.0, 100.0, 255.0, 20.0, 255.0, 100.0, 0.0, 0.0, 3.0, 0.0, 1.0])
    as_rounded = torch.tensor([7.0, 227.0, 255.0, 147.0, 127.0, 0.0, 2.0, 4.0, 0.0, 0.0, 0.0])
    scale = torch.tensor(0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, residual = (0.5 * first).to(dtype), (0.5 * second).to(dtype)
        found = add_fake_quantized(x, residual, scale, 255, rounded=True)
        assert found.dtype == dtype
        assert torch.equal(found, (0.5 * as_rounded).to(dtype))
    # as a residual that is not rounded yet, 255 is clamped to 127, and 0.6 is rounded to 1
    second[2], second[4], second[9] = 255.0, 255.0, 0.6
    as_unrounded = as_rounded.clone()
    as_unrounded[2], as_unrounded[4], as_unrounded[9] = 254.0, 0.0, 1.0
    found = add_fake_quantized(0.5 * first, 0.5 * second, scale, 255, rounded=False)
    assert torch.equal(found, 0.5 * as_unrounded)


def test_gradients_of_a_sum_pass_where_it_is_above_0_and_not_clamped() -> None:
    x = torch.tensor([10.0, 200.0, -200.0, -20.0, 127.0, 1.25], requires_grad=True)
    residual = torch.tensor([5.0, 20.0, 150.0, 10.0, 200.0, 0.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    add_fake_quantized(x, residual, scale, 255, rounded=True).sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 0, 0, 1]  # -10 is below 0, and 327 above 255; clamped summands have it too
    assert residual.grad.tolist() == [1, 1, 1, 0, 0, 1]
    assert scale.grad == 255 + (1 - 1.25)


@pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning")
@pytest.mark.skipif(not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uses", ["both", "sum", "convolutions"])
def test_the_input_of_a_block_is_rounded_as_by_its_layer(uses: str, dtype: torch.dtype) -> None:
    layer: Any = PlainQuantIdentity(act_quant=act_quant(IntQuantizer(4, signed=False, scale=0.21)))
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randint(256, SHAPE, generator=generator) * 0.0205).to(dtype)
    stored = stored.contiguous(memory_format=torch.channels_last)
    upstream = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2)]
    found = []
    for fused in (True, False):
        x = stored.clone(memory_format=torch.preserve_format).requires_grad_()
        quantizer_of(layer).scale.grad = None
        direct, rounded = block_inputs(x, layer) if fused else (x.view_as(x), layer(x))
        assert type(rounded.grad_fn).__name__ == ("_SplitRoundedBackward" if fused else "_FakeQuantizeBackward")
        pairs = list(zip((direct, rounded), upstream, strict=True))
        used = {"both": pairs, "sum": pairs[:1], "convolutions": pairs[1:]}[uses]
        torch.autograd.backward([y for y, _ in used], [g for _, g in used])
        scale = quantizer_of(layer).scale
        found.append((direct, rounded, x.grad, torch.zeros(()) if scale.grad is None else scale.grad))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=torch.finfo(dtype).eps)


@given(scale=st.floats(2.0**-14, 2.0**15, width=32))
def test_outputs_of_blocks_are_recovered_in_the_dtype_they_are_stored_in(scale: float) -> None:
    """Exactly but in bfloat16, whose 8 significant bits may move integers above 127 by one, and then no further."""
    integers, s = torch.arange(256.0), torch.tensor(scale)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        stored = (integers * s).to(dtype)
        if not stored.isfinite().all():
            continue
        found = torch.round(stored.float() / s)
        exact = 256 if dtype != torch.bfloat16 else 128
        assert torch.equal(found[:exact], integers[:exact])
        assert (found - integers).abs().max() <= 1
        again = add_fake_quantized(torch.zeros_like(stored), stored, s, 255, rounded=True)
        assert (torch.round(again.float() / s) - integers).abs().max() <= 1


def test_a_shared_scale_has_the_gradient_of_all_uses_and_the_limit_of_one() -> None:
    def after(uses: int, upstream: float) -> Tensor:
        quantizer = IntQuantizer(8, signed=False, scale=0.01, uses=uses)
        x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        for _ in range(uses):
            quantizer(x)[0].sum().mul(upstream).backward()
        assert quantizer.scale.grad is not None
        return quantizer.scale.grad

    small = 1e-6
    # three uses have three times the sum, which is divided by the square root of three times the values
    torch.testing.assert_close(after(3, small), after(1, small) * 3 / 3**0.5)
    for uses in (1, 3):
        for upstream in (1e6, -1e6):
            torch.testing.assert_close(after(uses, upstream).abs(), torch.tensor(0.02 * 0.01))


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5)])
def test_a_stage_has_one_scale_for_all_its_blocks(depth: int, blocks: int) -> None:
    model = build_model(f"quant_resnet{depth}", w_bits=4, a_bits=4)
    shared = {name: quantizer_of(m) for name, m in model.named_modules() if isinstance(m, ResidualQuantReLU)}
    assert list(shared) == ["stages.0.relu", "stages.1.relu", "stages.2.relu"]
    assert [quantizer.bits for quantizer in shared.values()] == [8, 8, 8]
    calls = dict.fromkeys(shared, 0)
    for name in shared:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 8, 8))
    assert calls == {"stages.0.relu": blocks + 1, "stages.1.relu": blocks, "stages.2.relu": blocks}
    for name, quantizer in shared.items():  # the shortcut's rounding is a use too
        assert quantizer.uses == blocks + 1, name


@torch.no_grad()
def test_outputs_of_blocks_are_integers_of_the_stage() -> None:
    torch.manual_seed(0)
    model = build_model("quant_resnet20", w_bits=4, a_bits=4).eval()
    outputs: list[tuple[int, Tensor]] = []
    inputs: list[Tensor] = []
    for stage in range(3):
        for block in range(3):
            layer = model.get_submodule(f"stages.{stage}.{block}")
            layer.register_forward_hook(lambda *call, stage=stage: outputs.append((stage, call[-1])))
            layer.get_submodule("input").register_forward_hook(lambda *call: inputs.append(call[-1]))
    model(torch.rand(2, 3, 16, 16))
    for stage, output in outputs:
        integers = output / quantizer_of(model.get_submodule(f"stages.{stage}.relu")).scale
        assert (integers - integers.round()).abs().max() < 1e-3
        assert 15 < integers.max() < 255.5  # more than 4 bits
        assert integers.min() >= 0
    assert len(outputs) == len(inputs) == 9
    for taken in inputs:  # what is multiplied with weights has 4
        assert len(taken.unique()) <= 16


def test_an_activation_of_a_sum_is_also_one_of_a_single_input(uncompiled: None) -> None:
    layer: Any = ResidualQuantReLU(act_quant(IntQuantizer(8, signed=False, scale=0.5)))
    x = torch.tensor([[-3.0, 0.3, 1.1, 63.6, 200.0]])
    expected = torch.tensor([[0.0, 0.5, 1.0, 63.5, 127.5]])
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, torch.zeros_like(x))[:, :4], expected[:, :4])
    assert layer(x, torch.zeros_like(x))[0, 4].tolist() == 127 * 0.5  # a summand has 8 signed bits


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (8, 8), (12, 12)])
@pytest.mark.parametrize(("kind", "stride"), [("depthwise", 1), ("depthwise", 2), ("pointwise", 1)])
def test_depthwise_and_pointwise_layers_train_like_torchs(
    uncompiled: None, kind: str, stride: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layers = QuantLayers(4, 4, 8)
    layer: Any
    quantizer: Any
    layer = layers.depthwise(8, stride) if kind == "depthwise" else layers.pointwise(8, 12)
    quantizer = quantizer_of(layer)
    quantizer.fit(layer.weight)
    x = torch.randn(3, 8, *size).contiguous(memory_format=torch.channels_last)
    steps = []
    for own in (True, False):
        layer.zero_grad()
        given_x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        if own:
            output = layer(given_x)
        else:
            weight = quantizer(layer.weight)[0]
            padding, groups = (1, 8) if kind == "depthwise" else (0, 1)
            output = F.conv2d(given_x, weight, stride=stride, padding=padding, groups=groups)
        output.square().mean().backward()
        steps.append((output.detach(), given_x.grad, layer.weight.grad.clone(), quantizer.scale.grad.clone()))
    for found, expected in zip(*steps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_scales_of_blocks_do_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):  # a builder that fits scales to no values
        assert build_model("quant_resnet20", w_bits=4, a_bits=4).get_parameter("fc.weight").is_meta
    models = [build_model("quant_resnet20", w_bits=4, a_bits=4) for _ in range(2)]
    state = {n: t.clone() for n, t in models[0].state_dict().items() if not n.endswith(".scale")}
    start_from_float(models[0], state, (0.0,) * 3, (1.0,) * 3)
    with torch.device("meta"):
        start_from_float(models[1], state, (0.0,) * 3, (1.0,) * 3)
    expected, found = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
