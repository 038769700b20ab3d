"""Fused BatchNorm, activation and pool, against the same layers one by one in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnvzoo.models import build_model, compiled, fake_quant, norm_act
from cnvzoo.models.fake_quant import IntRange, fake_quantize
from cnvzoo.models.layers import FloatLayers
from cnvzoo.models.norm_act import NormActSequential, QuantizedActivation
from cnvzoo.models.quant_layers import QuantLayers
from cnvzoo.models.resnet import ResNet

CHANNELS = 6
SHAPE = (5, CHANNELS, 26, 24)  # large enough to be compiled
pytestmark = [
    pytest.mark.skipif(not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here, so nothing is fused"),
    pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning"),
]


class Quantizer(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.ints = IntRange.of(bits, signed=False)
        self.scale = nn.Parameter(torch.tensor(2.5 / self.ints.high))

    def positive_scale(self, x: Tensor) -> Tensor:
        return self.scale


class QuantReLU(QuantizedActivation):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.activation_quantizer = Quantizer(bits)

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.activation_quantizer
        assert quantizer is not None
        return fake_quantize(x, quantizer.positive_scale(x).to(x.dtype), quantizer.ints)


def layers(act: str, pool: bool) -> NormActSequential:
    # only one kind has values of its own: the loops of a kind are compiled again for others than the default
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3) if act == "none" else nn.BatchNorm2d(CHANNELS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
        norm.weight[0].neg_()
    sequence = NormActSequential(norm)
    if act != "none":
        sequence.append(nn.ReLU() if act == "relu" else QuantReLU(int(act.removeprefix("quant"))))
    if pool:
        sequence.append(nn.MaxPool2d(2))
    return sequence


@dataclass
class Step:
    output: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def applied(sequence: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return sequence(x)
    norm, act = sequence[0], sequence[1] if len(sequence) > 1 else None  # type: ignore[index, arg-type]
    return norm_act.norm_act(x, norm, act, residual=residual)


def take(sequence: nn.Module, x: Tensor, upstream: Tensor, residual: Tensor | None = None) -> Step:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = {"x": x}
    if residual is not None:
        residual = residual.detach().to(x.dtype).clone(memory_format=torch.preserve_format).requires_grad_()
        inputs["residual"] = residual
    output = applied(sequence, x, residual)
    output.backward(upstream.to(output.dtype))
    gradients = {name: p.grad for name, p in [*sequence.named_parameters(), *inputs.items()] if p.grad is not None}
    return Step(output.detach(), gradients, dict(sequence.named_buffers()))


def fuses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list of the arguments of each fused step from now on."""
    calls: list[Any] = []
    original = norm_act.NormAct.apply
    monkeypatch.setattr(norm_act.NormAct, "apply", lambda *args: (calls.append(args), original(*args))[1])
    return calls


def bits_of(name: str) -> dict[str, int]:
    return {"w_bits": 4, "a_bits": 4} if name.startswith("quant_") else {}


def channels_last(*shape: int, seed: int) -> Tensor:
    x = 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return x.contiguous(memory_format=torch.channels_last)


VARIANTS = pytest.mark.parametrize(
    ("act", "pool", "residual", "dtype"),
    [
        ("none", False, False, torch.bfloat16),
        ("relu", False, False, torch.bfloat16),
        ("relu", True, False, torch.float32),
        ("relu", False, True, torch.bfloat16),
        ("none", False, True, torch.float32),
        ("quant4", False, False, torch.bfloat16),
        ("quant4", True, False, torch.bfloat16),
    ],
    ids=str,
)


@VARIANTS
def test_equals_the_layers_one_by_one(
    monkeypatch: pytest.MonkeyPatch, act: str, pool: bool, residual: bool, dtype: torch.dtype
) -> None:
    x = channels_last(*SHAPE, seed=0).to(dtype)
    other = channels_last(*SHAPE, seed=1).to(dtype) if residual else None
    upstream = channels_last(*SHAPE[:2], *(s // 2 if pool else s for s in SHAPE[2:]), seed=2).to(dtype)
    expected = take(layers(act, pool).double(), x.double(), upstream, other)
    calls = fuses(monkeypatch)
    found = take(layers(act, pool), x, upstream, other)
    assert len(calls) == 1
    assert found.output.dtype == dtype
    assert found.output.is_contiguous(memory_format=torch.channels_last)
    assert found.buffers["0.num_batches_tracked"] == 1
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(found.buffers[name], buffer, rtol=1e-6, atol=0, check_dtype=False, msg=name)

    rounding = 16 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    # rounding may move a value, and its gradient, across a threshold
    assert_mostly_close(found.output, expected.output, rounding)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        if gradient.dim() == 4:
            assert found.gradients[name].dtype == dtype
            assert_mostly_close(found.gradients[name], gradient, rounding)
        else:
            assert found.gradients[name].dtype == torch.float32
            spread = float(gradient.abs().max())
            torch.testing.assert_close(
                found.gradients[name], gradient, rtol=1e-3, atol=3e-3 * spread, check_dtype=False, msg=name
            )


def assert_mostly_close(found: Tensor, expected: Tensor, rounding: float) -> None:
    off = (found.double() - expected).abs() > 2 * rounding * (expected.abs() + expected.abs().mean())
    assert off.double().mean() < 2e-4


@VARIANTS
def test_second_order_gradients_are_refused(
    monkeypatch: pytest.MonkeyPatch, act: str, pool: bool, residual: bool, dtype: torch.dtype
) -> None:
    x = channels_last(*SHAPE, seed=0).to(dtype).requires_grad_()
    other = channels_last(*SHAPE, seed=1).to(dtype) if residual else None
    calls = fuses(monkeypatch)
    output = applied(layers(act, pool), x, other)
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("act", ["relu", "quant4"])
def test_hooks_of_a_pool_fire(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """None of the layers of a step is fused where one of them has hooks."""
    monkeypatch.setattr(fake_quant, "runs_compiled", lambda x: False)  # of the quantizer, which is not what is tested
    sequence, fired, calls = layers(act, True), [], fuses(monkeypatch)
    sequence[2].register_forward_pre_hook(lambda *_: fired.append("before"))
    sequence[2].register_forward_hook(lambda *_: fired.append("after"))
    sequence[2].register_full_backward_hook(lambda *_: fired.append("backward"))
    sequence(channels_last(*SHAPE, seed=0).bfloat16().requires_grad_()).sum().backward()
    assert calls == []
    assert fired == ["before", "after", "backward"]


def test_the_first_of_equal_values_in_a_window_gets_the_gradient() -> None:
    """As in nn.MaxPool2d; quantized values are often equal."""
    x = channels_last(*SHAPE, seed=0).bfloat16()
    upstream = torch.ones(*SHAPE[:2], SHAPE[2] // 2, SHAPE[3] // 2)
    pieces = layers("quant4", pool=True)
    with torch.no_grad():
        pieces[0].weight.fill_(0.01)  # type: ignore[union-attr]
        pieces[0].bias.fill_(1.5)  # type: ignore[union-attr]
    found = take(pieces, x, upstream)
    assert torch.equal(found.output, torch.full_like(found.output, 1.5))
    # all four values are 9 steps and not clipped, so BatchNorm's bias gets one gradient per window
    torch.testing.assert_close(found.gradients["0.bias"], upstream.sum((0, 2, 3)))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    threads, steps = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            x = channels_last(*SHAPE, seed=0).bfloat16()
            steps.append(take(layers("quant4", False), x, channels_last(*SHAPE, seed=2)))
    finally:
        torch.set_num_threads(threads)
    for step in steps[1:]:
        assert torch.equal(step.output, steps[0].output)
        for name, gradient in steps[0].gradients.items():
            assert torch.equal(step.gradients[name], gradient), name


def test_any_size_runs_the_loops_compiled_for_the_first() -> None:
    frames = torch._dynamo.utils.counters["frames"]
    seen = []
    for shape in (SHAPE, (20, CHANNELS, 12, 18), (2, CHANNELS, 64, 64), (1, CHANNELS, 128, 64), (64, CHANNELS, 1, 99)):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                take(layers("relu", False), channels_last(*shape, seed=0), channels_last(*shape, seed=2))
            seen.append(frames["total"])
    # a batch of one image is another variant, which training never has
    assert seen[0] == seen[5]


def test_loops_serve_quantizers_of_all_bits() -> None:
    frames = torch._dynamo.utils.counters["frames"]
    x, upstream, seen = channels_last(*SHAPE, seed=0).bfloat16(), channels_last(*SHAPE, seed=2), []
    for bits in (4, 1, 2, 8):
        sequence = layers(f"quant{bits}", False)
        output = take(sequence, x, upstream).output
        seen.append(frames["total"])
        step = sequence[1].activation_quantizer.positive_scale(x).detach()  # type: ignore[union-attr]
        levels = (torch.arange(2.0**bits) * step).bfloat16()
        assert torch.equal(output.unique(), levels.unique())  # bfloat16 may not distinguish two of them
    assert len(set(seen)) == 1


@pytest.mark.parametrize("case", ["eval", "no grad", "layout", "odd", "small", "pool of 3", "other act", "no gamma"])
def test_layers_that_cannot_be_fused_run_one_by_one(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    calls = fuses(monkeypatch)
    sequence = layers("relu", pool=True)
    shape = {"odd": (5, CHANNELS, 27, 24), "small": (2, CHANNELS, 8, 8)}.get(case, SHAPE)
    x = channels_last(*shape, seed=0)
    if case == "eval":
        sequence.eval()
    elif case == "layout":
        x = x.contiguous()
    elif case == "pool of 3":
        sequence[2] = nn.MaxPool2d(3)
    elif case == "other act":
        sequence[1] = type("OtherReLU", (nn.ReLU,), {})()
    elif case == "no gamma":
        sequence[0] = nn.BatchNorm2d(CHANNELS, affine=False)
    expected = nn.Sequential(*layers("relu", pool=True))
    expected[0] = nn.BatchNorm2d(CHANNELS, affine=case != "no gamma")
    expected.load_state_dict(sequence.state_dict())
    expected.train(sequence.training)
    expected[1], expected[2] = sequence[1], sequence[2]
    with torch.set_grad_enabled(case != "no grad"):
        assert torch.equal(sequence(x), expected(x))
    assert not calls


@pytest.mark.parametrize(
    ("name", "fused", "highs"),
    [
        ("cnv", 5, {None}),  # of 6: the last map is 1x1
        ("quant_cnv", 5, {15}),
        ("resnet20", 21, {None}),  # 19 and two shortcuts
        ("quant_resnet20", 21, {None, 15, 255}),  # a shortcut has no activation, and the output of a block 8 bits
        ("resnet18", 20, {None}),
        ("mobilenet_v1", 27, {None}),
        ("quant_mobilenet_v1", 27, {15}),
    ],
)
def test_models_run_fused(monkeypatch: pytest.MonkeyPatch, name: str, fused: int, highs: set[int | None]) -> None:
    variants: list[Any] = []
    found: list[int | None] = []

    def one_by_one(x: Tensor, *others: Any) -> Tensor:
        norm, variant, high = others[-3:]
        variants.append(variant)
        found.append(high)
        return nn.functional.max_pool2d(norm(x), 2) if variant.pool else norm(x)

    monkeypatch.setattr(norm_act.NormAct, "apply", one_by_one)
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 1)
    split: list[int] = []
    monkeypatch.setattr(norm_act, "split_rounded", lambda x, scale, high: (split.append(high), (x, x))[1])
    # the quantizers of weights are not what is tested
    monkeypatch.setattr(fake_quant, "runs_compiled", lambda x: False)
    model = build_model(name, **bits_of(name)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(4, 3, 32, 32))
    assert len(variants) == fused
    assert {v.dtype for v in variants} == {torch.bfloat16}
    assert set(found) == highs
    assert [v.quantizes for v in variants] == [high is not None for high in found]
    assert sum(v.residual for v in variants) == {"resnet20": 9, "resnet18": 8}.get(name.removeprefix("quant_"), 0)
    assert split == ([15] * 9 if name == "quant_resnet20" else [])  # the inputs of its blocks
    # what a shortcut with a convolution gives has not been rounded
    assert sum(v.rounded for v in variants) == (9 - 2 if name == "quant_resnet20" else 0)
    assert sum(v.pool for v in variants) == (2 if name.endswith("cnv") else 0)


def test_a_fused_residual_network_has_the_same_gradients() -> None:
    """Of one width, so that few loops are compiled; the second stage has a shortcut with a convolution.

    Not of fewer than 8 channels: oneDNN 3.12 with AVX2 writes beyond the gradient of a 1x1 convolution of these with
    stride 2.
    """
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiles in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "compiles", lambda device, compiles=compiles: compiles)
            torch.manual_seed(0)
            model = ResNet((8, 8), (1, 1), 10, 3, FloatLayers())
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            nn.functional.cross_entropy(model(images), torch.arange(16) % 10).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()})
    for key, expected in gradients[1].items():
        error = (gradients[0][key] - expected).norm() / expected.norm()
        assert error < 2e-2, f"{key}: {error}"


@pytest.mark.parametrize("name", ["cnv", "quant_cnv", "resnet20", "small quant_resnet", "mobilenet_v1"])
def test_a_whole_training_step_is_one_graph_for_the_compiler(name: str) -> None:
    """As on a GPU, where torch.compile fuses the whole model."""
    small = ResNet((4, 8), (2, 1), 10, 3, QuantLayers(4, 4, 8)) if name == "small quant_resnet" else None
    model = small or build_model(name, **bits_of(name))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        logits = forward(torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
