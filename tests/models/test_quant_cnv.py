"""Quantized models, mostly `quant_cnv`: their state is whole before the first run; levels are right; scales learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from brevitas.nn import QuantConv2d, QuantLinear, QuantReLU
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cnvzoo.models import build_model, compiled
from cnvzoo.models.quant import quantizer_of

WIDTHS = pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 1), (2, 2), (4, 4), (8, 8), (1, 8), (8, 1)])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled loops: compiling them for every width would take minutes."""
    monkeypatch.setattr(compiled, "compiles", lambda device: False)


def fresh(seed: int = 0, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("quant_cnv", **arguments)


def images(n: int = 4) -> Tensor:
    """8-bit images in [0, 1]."""
    return torch.randint(256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(1)) / 255


def quantized_layers(model: nn.Module) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The layers with weights and the activations, by name, in the order of the graph."""
    named = list(model.named_modules())
    weighted = [(n, m) for n, m in named if isinstance(m, (QuantConv2d, QuantLinear))]
    return weighted, [(n, m) for n, m in named if isinstance(m, QuantReLU)]


def integers(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale; fails if they are not whole numbers."""
    multiples = values / scale
    assert (multiples - multiples.round()).abs().max() < 1e-3
    return multiples.round()


def scale_of(state: dict[str, Tensor], layer: str) -> Tensor:
    (scale,) = (t for n, t in state.items() if n.startswith(f"{layer}.") and n.endswith(".scale"))
    return scale


@WIDTHS
def test_fresh_state_round_trips(w_bits: int, a_bits: int, tmp_path: Path) -> None:
    model = fresh(0, w_bits=w_bits, a_bits=a_bits).eval()
    save_file(model.state_dict(), tmp_path / "fresh.safetensors")
    other = fresh(1, w_bits=w_bits, a_bits=a_bits).eval()
    with torch.no_grad():
        logits = model(images())
        assert not torch.equal(other(images()), logits)
        other.load_state_dict(load_file(tmp_path / "fresh.safetensors"), strict=True)
        assert torch.equal(other(images()), logits)
    # the logits of an untrained model differ between images and between classes at every bit width
    assert (logits.std(0) > 0).any()
    assert (logits.std(1) > 0).all()


@WIDTHS
def test_every_parameter_gets_a_gradient(plain: None, w_bits: int, a_bits: int) -> None:
    model = fresh(w_bits=w_bits, a_bits=a_bits)
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    assert len(list(model.parameters())) == 9 + 2 * 8 + 9 + 8  # weights, norms, scales of weights and activations
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@WIDTHS
def test_levels_and_plain_tensors(w_bits: int, a_bits: int) -> None:
    model = fresh(w_bits=w_bits, a_bits=a_bits).eval()
    state = model.state_dict()
    weighted, activations = quantized_layers(model)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            assert type(output) is Tensor, f"{name} gives a {type(output).__name__}"
            assert all(type(a) is Tensor for a in args), name
            seen[name] = output

        return hook

    for part in ("input", "features", "classifier"):
        for name, layer in [(part, model.get_submodule(part)), *model.get_submodule(part).named_children()]:
            layer.register_forward_hook(keep(part if layer is model.get_submodule(part) else f"{part}.{name}"))
    with torch.no_grad():
        assert type(model(images())) is Tensor

    assert (len(weighted), len(activations)) == (9, 8)
    for index, (name, layer) in enumerate(weighted):
        bits = 8 if index == 0 else w_bits
        scale = scale_of(state, name)
        assert scale.numel() == (1 if index == 8 else layer.weight.shape[0])
        with torch.no_grad():
            ints = integers(quantizer_of(layer)(layer.weight)[0], scale)
        if bits == 1:
            assert ints.unique().tolist() == [-1, 1]
        else:
            assert ints.abs().max() <= 2 ** (bits - 1) - 1
            assert len(ints.unique()) > 2 ** (bits - 1)  # all of the width is used
    for name, _ in activations:
        ints = integers(seen[name], scale_of(state, name))
        assert ints.min() >= 0
        assert ints.max() <= 2**a_bits - 1
        assert len(ints.unique()) > 1
    torch.testing.assert_close(seen["input"], images(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("first_w_bits", [1, 5])
def test_first_layer_has_its_own_width(first_w_bits: int) -> None:
    model = fresh(w_bits=4, a_bits=4, first_w_bits=first_w_bits)
    weighted, _ = quantized_layers(model)
    widths = []
    for name, layer in weighted[:2]:
        with torch.no_grad():
            widths.append(
                integers(quantizer_of(layer)(layer.weight)[0], scale_of(model.state_dict(), name)).abs().max()
            )
    assert widths[0] == max(2 ** (first_w_bits - 1) - 1, 1)
    assert widths[1] == 7


def test_initial_activation_scales_use_every_level(plain: None) -> None:
    """Of a 2-bit ReLU after a new BatchNorm, every level has at least 3 % of the values."""
    model = fresh(w_bits=2, a_bits=2)
    _, activations = quantized_layers(model)
    outputs: list[Tensor] = []
    activations[0][1].register_forward_hook(lambda m, i, o: outputs.append(o))
    model(images())
    _, counts = outputs[0].detach().unique(return_counts=True)
    assert len(counts) == 4
    assert (counts / outputs[0].numel()).min() > 0.03


def test_scales_learn(plain: None) -> None:
    model = fresh(w_bits=3, a_bits=3)
    scales = {n: p for n, p in model.named_parameters() if n.endswith(".scale")}
    before = {n: p.detach().clone() for n, p in scales.items()}
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert len(scales) == 9 + 8
    assert all(not torch.equal(p, before[n]) for n, p in scales.items())


def test_loading_a_state_changes_no_later_step(plain: None) -> None:
    """Brevitas builds parts of its layers again at every load: a resumed run must take the same steps."""
    gradients = []
    for loads in (False, True):
        model = fresh(w_bits=3, a_bits=3)
        if loads:
            model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, strict=True)
        F.cross_entropy(model(images()), torch.arange(4)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for with_load, without in zip(*gradients, strict=True):
        assert with_load is not None
        assert without is not None
        assert torch.equal(with_load, without)


def test_a_negative_scale_is_clamped_to_a_positive_one() -> None:
    """Activations must be neither inverted nor infinite, whatever an optimizer does to the scale."""
    model = fresh(w_bits=3, a_bits=3).eval()
    name, activation = quantized_layers(model)[1][0]
    outputs: list[Tensor] = []
    activation.register_forward_hook(lambda m, i, o: outputs.append(o))
    with torch.no_grad():
        scale_of(model.state_dict(), name).neg_()
        assert model(images()).isfinite().all()
    assert outputs[0].min() >= 0


def test_a_negative_scale_gets_a_gradient() -> None:
    """Without one, a channel whose scale became negative would be dead for the rest of the run."""
    model = fresh(w_bits=3, a_bits=3)
    name, layer = quantized_layers(model)[0][1]
    scale = dict(model.named_parameters())[f"{name}.weight_quant.tensor_quant.scale"]
    with torch.no_grad():
        scale[5] = -0.5
    # this loss falls as the scale of channel 5 grows
    (quantizer_of(layer)(layer.weight)[0] * layer.weight.detach()).sum().neg().backward()
    assert scale.grad is not None
    assert scale.grad[5] < 0
    torch.optim.SGD([scale], lr=100).step()
    assert scale[5] > 0


@pytest.mark.parametrize("push", [1.0, -1.0, 0.3])
def test_no_gradient_makes_a_scale_negative(push: float) -> None:
    """At the largest learning rate and momentum of the recipes, under gradients a million times too large."""
    model = fresh(w_bits=4, a_bits=4)
    name, layer = quantized_layers(model)[0][1]
    scale = dict(model.named_parameters())[f"{name}.weight_quant.tensor_quant.scale"]
    optimizer = torch.optim.SGD([scale], lr=0.1, momentum=0.9, nesterov=True)
    weight = layer.weight.detach()
    with torch.no_grad():
        scale.mul_(0.2)  # most weights are clipped, and a smaller scale clips more
    start = scale.detach().clone()
    for step in range(400):
        optimizer.zero_grad()
        # push the scale down for 200 steps, then on, back, or on more weakly
        direction = 1e6 if step < 200 else 1e6 * push
        (quantizer_of(layer)(layer.weight)[0] * weight.sign()).sum().mul(direction).backward()
        assert scale.grad is not None
        assert (scale.grad.abs() <= 0.0201 * scale.abs()).all()
        optimizer.step()
        assert (scale > 0).all()
    assert push < 0 or (scale < 1e-2 * start).all()


def test_gradient_of_a_weight_scale_is_that_of_lsq() -> None:
    """Esser et al. 2020, section 2.2: divided by sqrt(values that share the scale * largest integer)."""
    model = fresh(w_bits=4, a_bits=4).eval()
    (name, layer) = quantized_layers(model)[0][3]
    scale = dict(model.named_parameters())[next(n for n in model.state_dict() if n.startswith(f"{name}.weight_quant"))]
    weight = layer.weight.detach()
    upstream = 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(quantizer_of(layer)(layer.weight)[0], scale, upstream)
    v = (weight / scale.detach()).double()
    q = v.round().clamp(-7, 7)
    plain = (upstream * torch.where(v.round().abs() <= 7, q - v, q)).sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient.double(), plain / (weight[0].numel() * 7) ** 0.5, rtol=1e-3, atol=1e-8)


@pytest.mark.skipif(not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here to compile with")
def test_compiled_loops_give_the_same_step() -> None:
    steps = []
    for compiles in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "compiles", lambda device, compiles=compiles: compiles)
            model = fresh(w_bits=4, a_bits=4)
            logits = model(images())
            F.cross_entropy(logits, torch.arange(4)).backward()
            steps.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(steps[0][0], steps[1][0])
    for name, expected in steps[1][1].items():
        assert expected is not None
        torch.testing.assert_close(
            steps[0][1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=name
        )


@pytest.mark.parametrize("name", ["quant_resnet20", "quant_mobilenet_v1"])
def test_loading_a_state_into_another_model_gives_its_logits_and_steps(plain: None, name: str) -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(build_model(name, w_bits=4, a_bits=4))
    models[1].load_state_dict({n: t.clone() for n, t in models[0].state_dict().items()}, strict=True)
    steps = []
    for model in models:
        logits = model(images())
        F.cross_entropy(logits, torch.arange(4)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        steps.append([logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*steps, strict=True))


@pytest.mark.skipif(not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here to compile with")
def test_torch_compile() -> None:
    model = fresh(w_bits=4, a_bits=4).eval()
    with torch.no_grad():
        expected = model(images())
        logits = torch.compile(model, fullgraph=True)(images())
    # sums in another order may move a value across a rounding threshold, which changes it by one level
    assert (logits - expected).abs().max() < 0.05 * expected.std()
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_torch_compile_gives_the_same_gradients(plain: None) -> None:
    gradients = []
    for traced in (False, True):
        model = fresh(w_bits=4, a_bits=4)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if traced else model
        F.cross_entropy(forward(images()), torch.arange(4)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()), msg=name
        )


@pytest.mark.parametrize(
    ("name", "w_bits", "a_bits"),
    [("quant_cnv", 4, 4), ("quant_cnv", 1, 1), ("quant_resnet20", 4, 4)],
)
def test_torch_export_with_any_batch_size(name: str, w_bits: int, a_bits: int) -> None:
    model = build_model(name, w_bits=w_bits, a_bits=a_bits).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for n in (1, 4, 7):
            torch.testing.assert_close(exported(images(n)), model(images(n)), rtol=1e-5, atol=1e-5)
