"""The graphs: published parameter counts, and the logits of independent implementations of the same networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnvzoo.models import build_model, model_info, model_names, model_spec

FLOAT_MODELS = [name for name in model_names() if not model_spec(name).quantized]

# At 10 and at 100 classes. The CIFAR ResNets at 100: 90 more rows of 64 weights and a bias. ResNet-18: the 11,689,512
# of the ImageNet model, with a 3x3 stem in place of the 7x7 one and another head.
_RESNET18 = 11_689_512 - 3 * 64 * (49 - 9) - 1000 * 513
PARAMETERS = {
    "cnv": (1_546_688, 1_592_768),
    "mobilenet_v1": (3_217_226, 3_309_476),
    "resnet18": (_RESNET18 + 10 * 513, _RESNET18 + 100 * 513),
    "resnet20": (272_474, 272_474 + 90 * 65),
    "resnet32": (466_906, 466_906 + 90 * 65),
    "resnet44": (661_338, 661_338 + 90 * 65),
    "resnet56": (855_770, 855_770 + 90 * 65),
    "resnet110": (1_730_714, 1_730_714 + 90 * 65),
}


def bits_of(name: str) -> dict[str, int]:
    return {"w_bits": 4, "a_bits": 4} if model_spec(name).quantized else {}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def with_random_norms(name: str, **arguments: int) -> nn.Module:
    """A model in eval mode with random values in its BatchNorms, so that an exchanged one shows."""
    torch.manual_seed(0)
    model = build_model(name, **arguments)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def assert_same_logits(model: nn.Module, reference: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        logits, expected = model(x), reference(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_every_float_model_has_a_published_count() -> None:
    assert set(FLOAT_MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_parameter_counts(name: str) -> None:
    assert (count(build_model(name)), count(build_model(name, num_classes=100))) == PARAMETERS[name]


def test_quant_cnv_is_cnv_and_scales() -> None:
    # A scale per hidden output channel, one for the last layer, one for each of the eight activations.
    scales = 2 * (64 + 128 + 256 + 512) + 1 + 8
    for num_classes in (10, 100):
        twin = build_model("cnv", num_classes=num_classes).state_dict()
        model = build_model("quant_cnv", num_classes=num_classes, w_bits=2, a_bits=2)
        state = model.state_dict()
        assert {n: t.shape for n, t in state.items() if n in twin} == {n: t.shape for n, t in twin.items()}
        added = [t for n, t in state.items() if n not in twin]
        assert sum(t.numel() for t in added) == scales
        assert len(added) == 9 + 8
        assert count(model) == PARAMETERS["cnv"][num_classes == 100] + scales


def resnet_sizes(widths: tuple[int, ...], blocks: int, a_bits: int) -> tuple[int, int, int]:
    """Weights of the first convolution and of all other layers, and scales, at 10 classes."""
    first, others, convolved = 27 * widths[0], 10 * widths[-1], widths[0]
    for before, width in zip((None, *widths), widths, strict=False):
        others += 9 * width * width * (2 * blocks - (before is not None))
        convolved += 2 * blocks * width
        if before is not None:  # the first convolution has fewer inputs, and there is a shortcut
            others += (9 + 1) * before * width
            convolved += width
    rounded = 2 if a_bits < 8 else 1  # inside a block, and its input, which has 8 bits already
    activations = len(widths) + rounded * blocks * len(widths)  # outputs of blocks have one scale per stage
    return first, others, convolved + 1 + activations


def mobilenet_sizes() -> tuple[int, int, int]:
    inputs = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024)
    outputs = (*inputs[1:], 1024)
    others = 9 * sum(inputs) + sum(i * o for i, o in zip(inputs, outputs, strict=True)) + 10 * 1024
    return 27 * 32, others, 32 + sum(inputs) + sum(outputs) + 1 + 1 + 2 * 13


@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 4), (3, 8)])
@pytest.mark.parametrize("name", [name for name in model_names("quant_*") if name != "quant_cnv"])
def test_sizes_of_quantized_models(name: str, w_bits: int, a_bits: int) -> None:
    """A scale per output channel, one for the last layer, and those of the activations."""
    if name == "quant_mobilenet_v1":
        first, others, scales = mobilenet_sizes()
    elif name == "quant_resnet18":
        first, others, scales = resnet_sizes((64, 128, 256, 512), 2, a_bits)
    else:
        depth = int(name.removeprefix("quant_resnet"))
        first, others, scales = resnet_sizes((16, 32, 64), (depth - 2) // 6, a_bits)
    info = model_info(name, w_bits=w_bits, a_bits=a_bits)
    twin = name.removeprefix("quant_")
    assert info.parameters == PARAMETERS[twin][0] + scales
    assert info.weight_bytes == math.ceil((8 * first + w_bits * others) / 8)
    assert model_info(twin).weight_bytes == 4 * (first + others)
    assert info.macs == model_info(twin).macs


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1"])
def test_a_quantized_model_has_the_initial_weights_of_its_float_twin(name: str) -> None:
    states = []
    for model, bits in ((name, {}), (f"quant_{name}", {"w_bits": 2, "a_bits": 3})):
        torch.manual_seed(5)
        states.append(build_model(model, **bits).state_dict())
    assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())
    assert {key.rpartition(".")[2] for key in states[1].keys() - states[0].keys()} == {"scale"}


@pytest.mark.parametrize("name", model_names())
def test_output_shapes(name: str) -> None:
    size = model_spec(name).input_size or 28
    for num_classes, in_chans in ((10, 3), (100, 1)):
        model = build_model(name, num_classes=num_classes, in_chans=in_chans, **bits_of(name)).eval()
        with torch.no_grad():
            assert model(torch.rand(2, in_chans, size, size)).shape == (2, num_classes)
            if size == 28 and num_classes == 10:
                assert model(torch.rand(1, in_chans, 32, 32)).shape == (1, num_classes)


def test_cnv_is_the_published_graph() -> None:
    model = with_random_norms("cnv")
    tensors: Iterator[Tensor] = iter(t for n, t in model.state_dict().items() if "num_batches" not in n)

    def norm_relu(x: Tensor) -> Tensor:
        gamma, beta, mean, var = (next(tensors) for _ in range(4))
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, eps=1e-4))

    def reference(x: Tensor) -> Tensor:
        for stage in range(3):
            for _ in range(2):
                x = norm_relu(F.conv2d(x, next(tensors)))
            x = F.max_pool2d(x, 2) if stage < 2 else x
        x = x.reshape(len(x), 256)
        for _ in range(2):
            x = norm_relu(F.linear(x, next(tensors)))
        return F.linear(x, next(tensors))

    assert_same_logits(model, reference, torch.rand(4, 3, 32, 32))


@pytest.mark.parametrize("depth", [20, 32])
def test_cifar_resnet_is_the_published_graph(depth: int) -> None:
    model = with_random_norms(f"resnet{depth}")
    tensors: Iterator[Tensor] = iter(t for n, t in model.state_dict().items() if "num_batches" not in n)

    def conv_norm(x: Tensor, stride: int) -> Tensor:
        weight, gamma, beta, mean, var = (next(tensors) for _ in range(5))
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.batch_norm(x, mean, var, gamma, beta)

    def reference(x: Tensor) -> Tensor:
        x = F.relu(conv_norm(x, 1))
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                y = conv_norm(F.relu(conv_norm(x, stride)), 1)
                x = F.relu(y + (conv_norm(x, stride) if stride == 2 else x))
        return F.linear(x.mean((2, 3)), next(tensors), next(tensors))

    assert_same_logits(model, reference, torch.rand(2, 3, 28, 28))


def test_resnet18_is_torchvisions_with_a_small_stem() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    reference = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = nn.Identity()  # type: ignore[assignment]
    model = with_random_norms("resnet18")
    values = model.state_dict().values()
    reference.load_state_dict(dict(zip(reference.state_dict(), values, strict=True)))
    assert_same_logits(model, reference.eval(), torch.rand(2, 3, 32, 32))


def test_mobilenet_is_the_published_graph() -> None:
    model = with_random_norms("mobilenet_v1")
    tensors: Iterator[Tensor] = iter(t for n, t in model.state_dict().items() if "num_batches" not in n)

    def conv_norm_relu(x: Tensor, stride: int, depthwise: bool) -> Tensor:
        weight, gamma, beta, mean, var = (next(tensors) for _ in range(5))
        groups = x.shape[1] if depthwise else 1
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        return F.relu(F.batch_norm(x, mean, var, gamma, beta))

    def reference(x: Tensor) -> Tensor:
        x = conv_norm_relu(x, 1, depthwise=False)
        widths = [x.shape[1]]
        for stride in (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1):
            x = conv_norm_relu(conv_norm_relu(x, stride, depthwise=True), 1, depthwise=False)
            widths.append(x.shape[1])
        assert widths == [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
        assert x.shape[2:] == (2, 2)
        return F.linear(x.mean((2, 3)), next(tensors), next(tensors))

    assert_same_logits(model, reference, torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 4), (2, 3), (8, 8), (1, 1)])
def test_quant_resnet_is_the_documented_graph(w_bits: int, a_bits: int) -> None:
    """Computed in float64 from the state: rounded, added and clamped as docs/quantization.md says."""
    model = with_random_norms("quant_resnet20", w_bits=w_bits, a_bits=a_bits)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def scale(layer: str) -> Tensor:
        (found,) = (t for n, t in state.items() if n.startswith(f"{layer}.") and n.endswith("quant.scale"))
        return found

    def weight(layer: str, bits: int) -> Tensor:
        v, high = state[f"{layer}.weight"] / scale(layer), 2 ** (bits - 1) - 1
        return scale(layer) * (torch.where(v >= 0, 1.0, -1.0).double() if bits == 1 else v.round().clamp(-high, high))

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1, bits: int = w_bits) -> Tensor:
        w = weight(conv, bits)
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        mean, var, gamma, beta = (state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gamma, beta)

    def levels(x: Tensor, layer: str, low: int, high: int) -> Tensor:
        return (x / scale(layer)).round().clamp(low, high)

    def reference(x: Tensor) -> Tensor:
        x = conv_norm((x.double() * 255).round() / 255, "conv", "norm", bits=8)
        outputs = levels(x, "stages.0.relu", 0, 255)  # integers
        output_scale = scale("stages.0.relu")
        for stage in range(3):
            for number in range(3):
                block, relu = f"stages.{stage}.{number}", f"stages.{stage}.relu"
                stride = 2 if stage and not number else 1
                taken = outputs * output_scale
                if a_bits < 8:
                    taken = levels(taken, f"{block}.input", 0, 2**a_bits - 1) * scale(f"{block}.input")
                y = conv_norm(taken, f"{block}.conv1", f"{block}.norm1", stride)
                y = levels(y, f"{block}.relu", 0, 2**a_bits - 1) * scale(f"{block}.relu")
                y = levels(conv_norm(y, f"{block}.conv2", f"{block}.norm2"), relu, -128, 127)
                if stride == 2:
                    shortcut = conv_norm(taken, f"{block}.shortcut.0", f"{block}.shortcut.1", 2)
                    outputs = levels(shortcut, relu, -128, 127)
                outputs, output_scale = (y + outputs).clamp(0, 255), scale(relu)
        return F.linear((outputs * output_scale).mean((2, 3)), weight("fc", w_bits), state["fc.bias"])

    x = torch.randint(256, (4, 3, 28, 28)) / 255
    with torch.no_grad():
        logits, expected = model(x), reference(x)
    # a value that float32 rounds to the next level changes those after it a little
    assert (logits - expected).square().mean().sqrt() < 0.02 * expected.std()


@pytest.mark.parametrize("name", ["cnv", "resnet20", "mobilenet_v1", "quant_cnv", "quant_resnet20"])
def test_seed_decides_the_initial_state(name: str) -> None:
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        states.append(build_model(name, **bits_of(name)).state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not all(torch.equal(states[0][n], states[2][n]) for n in states[0])


@pytest.mark.parametrize("name", ["cnv", "resnet20", "mobilenet_v1", "quant_resnet20", "quant_mobilenet_v1"])
def test_new_models_have_a_plausible_loss_and_finite_gradients_other_than_zero(uncompiled: None, name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, **bits_of(name))
    images = torch.rand(8, 3, 32, 32) if model_spec(name).quantized else torch.randn(8, 3, 32, 32)
    loss = F.cross_entropy(model(images), torch.arange(8))
    loss.backward()
    assert 0.2 * math.log(10) < float(loss.detach()) < 10 * math.log(10)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name
