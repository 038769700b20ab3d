"""Models as torch modules: features and head, attributes that describe a model, pickling, and the check of input."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brevitas.nn import QuantReLU
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import cnvzoo
from cnvzoo.errors import ModelError
from cnvzoo.models import Classifier, build_model, fake_quant, model_spec, norm_act
from cnvzoo.models.classifier import PooledClassifier
from cnvzoo.models.layers import FloatLayers

FEATURES = {
    "cnv": ((256, 1, 1), 512), "quant_cnv": ((256, 1, 1), 512), "resnet20": ((64, 8, 8), 64),
    "resnet18": ((512, 4, 4), 512), "mobilenet_v1": ((1024, 2, 2), 1024),
    "quant_resnet20": ((64, 8, 8), 64), "quant_mobilenet_v1": ((1024, 2, 2), 1024),
}  # fmt: skip
BITS = {"w_bits": 3, "a_bits": 4}
NAMES = ["cnv", "quant_cnv", "resnet20", "quant_resnet20", "mobilenet_v1", "quant_mobilenet_v1"]
QUANTIZED = [name for name in NAMES if name.startswith("quant_")]


def built(name: str, **arguments: Any) -> Classifier:
    bits = BITS if model_spec(name).quantized else {}
    model = build_model(name, **bits, **arguments)
    if name == "quant_mobilenet_v1":  # with the initial statistics, values shrink from layer to layer to level 0
        with torch.no_grad():
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = 1.0
            model(images(8, model.in_chans))
            for norm in norms:
                norm.momentum = 0.1
    return model.eval()


def images(count: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_features_and_head_make_the_logits(name: str) -> None:
    model, (shape, hidden) = built(name), FEATURES[name]
    features = model.forward_features(images())
    assert features.shape == (2, *shape)
    assert (model.num_features, model.head_hidden_size) == (shape[0], hidden)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, hidden)
    assert torch.equal(model.get_classifier()(pooled), model(images()))
    assert torch.equal(model.forward_head(features), model(images()))


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_a_model_without_head_returns_what_the_head_takes(name: str) -> None:
    whole, headless = built(name), built(name, num_classes=0)
    state = whole.state_dict()
    own = headless.state_dict()
    assert [key for key in state if key in own] == list(own)
    headless.load_state_dict({key: state[key] for key in own}, strict=True)
    expected = whole.forward_head(whole.forward_features(images()), pre_logits=True)
    assert torch.equal(headless(images()), expected)
    assert headless.num_classes == 0
    whole.reset_classifier(0)
    assert torch.equal(whole(images()), expected)


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_a_reset_head_is_that_of_a_new_model(name: str) -> None:
    model = built(name)
    model.classes = tuple("abcdefghij")
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    head = type(model.get_classifier())
    model.reset_classifier(np.int64(4))  # type: ignore[arg-type]
    twin = built(name, num_classes=4)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in twin.state_dict().items()
    }
    last = [key for key, value in twin.state_dict().items() if value.shape != kept[key].shape]
    assert all(
        torch.equal(value, kept[key])
        for key, value in model.state_dict().items()
        if "6" not in key and key not in last and "fc" not in key
    )
    assert type(model.get_classifier()) is head
    assert model(images()).shape == (2, 4)
    assert (model.num_classes, model.arguments["num_classes"], model.classes) == (4, 4, None)
    assert not model.get_classifier().training
    with pytest.raises(ModelError, match="num_classes=-1"):
        model.reset_classifier(-1)


def test_a_model_has_its_arguments_as_attributes() -> None:
    numbers: dict[str, Any] = {"w_bits": np.int64(2), "a_bits": np.int8(3), "first_w_bits": np.uint8(4)}
    model = build_model("quant_cnv", num_classes=7, in_chans=1, **numbers)
    assert model.arguments == {
        "name": "quant_cnv", "num_classes": 7, "in_chans": 1, "w_bits": 2, "a_bits": 3, "first_w_bits": 4,
    }  # fmt: skip
    assert all(type(value) in (int, str) for value in model.arguments.values())
    assert (model.num_classes, model.in_chans, model.w_bits, model.a_bits) == (7, 1, 2, 3)
    assert (model.classes, model.preprocessing, model.pretrained_cfg) == (None, None, None)
    twin = build_model("resnet20")
    assert (twin.w_bits, twin.a_bits, twin.in_chans) == (None, None, 3)


@pytest.mark.parametrize("argument", ["num_classes", "in_chans", "w_bits", "a_bits", "first_w_bits"])
@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_bools_are_not_accepted_as_numbers(argument: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"{argument}=.*not a whole number"):
        build_model("quant_cnv", **{**BITS, argument: value})


def copies(model: nn.Module) -> list[Any]:
    """The model pickled, saved by torch.save, and copied."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), copy.deepcopy(model)]


@pytest.mark.parametrize("name", FEATURES)
def test_models_are_pickled_saved_and_copied(name: str) -> None:
    model = built(name)
    convolution, norm = (
        next(n for n, m in model.named_modules() if isinstance(m, c)) for c in (nn.Conv2d, nn.BatchNorm2d)
    )
    model.get_submodule(norm).train()
    model.get_parameter(f"{convolution}.weight").requires_grad_(False)
    before = torch.get_rng_state()
    for again in copies(model):
        assert again.spec is model.spec
        assert again.arguments == model.arguments
        assert [(n, type(m), m.training) for n, m in again.named_modules()] == [
            (n, type(m), m.training) for n, m in model.named_modules()
        ]
        assert list(again.state_dict()) == list(model.state_dict())
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        assert torch.equal(again.eval()(images()), copy.deepcopy(model).eval()(images()))
        with pytest.raises(ModelError, match="3 channel"):
            again(images(channels=2))
    assert torch.equal(torch.get_rng_state(), before)


def _noted(*_: Any) -> None:
    _calls.append(1)


_calls: list[int] = []


def test_copies_keep_the_hooks_of_proxies() -> None:
    model = built("quant_cnv")
    proxies = ["features.0.weight_quant", "features.2.act_quant", "features.2.act_quant.fused_activation_quant_proxy"]
    for name in proxies:
        model.get_submodule(name).register_forward_hook(_noted)
    for again in copies(model):
        assert [len(again.get_submodule(name)._forward_hooks) for name in proxies] == [1, 1, 1]
        _calls.clear()
        again.features[0].quant_weight()
        again.get_submodule(proxies[1])(torch.rand(3))
        assert len(_calls) == 3


@pytest.mark.parametrize("name", QUANTIZED)
@torch.no_grad()
def test_a_state_loaded_into_a_copy_of_a_quantized_model_leaves_the_original_as_it_was(name: str) -> None:
    model = built(name)
    expected = model(images())
    state = {key: value * 2 if key.endswith(".scale") else value for key, value in model.state_dict().items()}
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    for again in copies(model):
        again.load_state_dict(state)
        assert not torch.equal(again(images()), expected)
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
        assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert torch.equal(model(images()), expected)


@torch.no_grad()
def test_pickled_models_give_equal_logits_in_another_process(tmp_path: Path) -> None:
    models = [built(name) for name in ("resnet20", "quant_cnv", "quant_resnet20")]
    (tmp_path / "m.pkl").write_bytes(pickle.dumps([(model, images(), model(images())) for model in models]))
    code = "import pickle, sys, torch; torch.set_grad_enabled(False)\n"
    code += (
        "for m, x, y in pickle.load(open(sys.argv[1], 'rb')): print(torch.equal(m(x), y), m.spec.name, m.num_classes)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.pkl")], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["True resnet20 10", "True quant_cnv 10", "True quant_resnet20 10"], done.stderr


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_input_is_given_by_position_or_by_name(name: str) -> None:
    model = built(name)
    assert torch.equal(model(x=images()), model(images()))
    with pytest.raises(ModelError, match="3 channel"):
        model(x=images(channels=1))
    with pytest.raises(ModelError, match="a tensor of images"):
        model([images()])
    with pytest.raises(TypeError, match="'x'"):
        model()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FEATURES)
def test_an_empty_batch_has_no_logits_and_gradients_of_zero(name: str, training: bool) -> None:
    model = built(name).train(training).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits = model(images(0))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@torch.no_grad()
def test_the_check_of_input_uses_the_current_layers() -> None:
    model = built("resnet20")
    model.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    model.fc = nn.Linear(64, 2)
    assert model(images(channels=1)).shape == (2, 2)
    assert (model.in_chans, model.num_classes) == (1, 2)
    with pytest.raises(ModelError, match=r"1 channel.*given 3"):
        model(images())
    model.fc = nn.Identity()
    assert model(images(channels=1)).shape == (2, 64)
    assert model.num_classes == 0


@pytest.mark.parametrize("name", FEATURES)
def test_images_of_whole_numbers_are_refused(name: str) -> None:
    model = built(name)
    for x in (images().mul(255).byte(), images().long()):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ModelError) as error:
            model(x)
        assert str(error.value) == (
            f"{model.spec.name} takes images as floating-point numbers, not {x.dtype}: cnvzoo.transforms makes them of "
            "images"
        )


class HeadFirst(Classifier):
    """Its head is a convolution, defined before the layer that takes the images."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, num_classes, 1)
        self.input_layer = nn.Conv2d(in_chans, 8, 3)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.input_layer(x)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return (features if pre_logits else self.head(features)).mean((2, 3))

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_classifier(self, layer: nn.Module) -> None:
        self.head = layer


@torch.no_grad()
def test_the_layer_that_takes_the_images_need_not_be_defined_first() -> None:
    cnvzoo.register_model("head_first", summary="of tests")(HeadFirst)
    try:
        model = build_model("head_first", num_classes=4, in_chans=1)
        assert (model._input_layer, model.in_chans) == ("input_layer", 1)
        assert model(images(channels=1)).shape == (2, 4)
        with pytest.raises(ModelError, match=r"built for 1 channel.*given 8"):
            model(images(channels=8))
        model.input_layer = nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU())
        assert model.in_chans == 5
        assert model(images(channels=5)).shape == (2, 4)
    finally:
        cnvzoo.unregister_model("head_first")


def test_a_model_may_rearrange_the_pixels_before_its_first_convolution() -> None:
    class Unshuffled(PooledClassifier):
        def __init__(self, num_classes: int, in_chans: int) -> None:
            super().__init__(FloatLayers())
            self.blocks, self.conv = nn.PixelUnshuffle(4), nn.Conv2d(in_chans * 16, 8, 3)
            self.num_features = self.head_hidden_size = 8
            self.fc = self.new_classifier(num_classes)

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.blocks(x))

    cnvzoo.register_model("unshuffled", summary="for a test")(Unshuffled)
    try:
        model = cnvzoo.create_model("unshuffled", num_classes=5)
        assert model.in_chans == 3
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
        with pytest.raises(cnvzoo.ModelError, match=r"was built for 3 channel\(s\) and was given 1"):
            model(torch.zeros(2, 1, 32, 32))
    finally:
        cnvzoo.unregister_model("unshuffled")


def test_models_of_other_classes_have_the_attributes_too() -> None:
    @cnvzoo.register_model("plain_net", summary="of tests")
    def plain(num_classes: int, in_chans: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_chans, num_classes, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    try:
        model = build_model("plain_net", num_classes=4)
        assert (model.num_classes, model.in_chans, model.w_bits, model.classes) == (4, 3, None, None)
        assert model(images()).shape == (2, 4)
        with pytest.raises(ModelError, match="num_classes=0"):
            build_model("plain_net", num_classes=0)
        assert cnvzoo.register_model("plain_net", summary="again")(plain) is plain
        assert model_spec("plain_net").summary == "again"
    finally:
        cnvzoo.unregister_model("plain_net")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "node"), [("resnet20", "stages.1"), ("mobilenet_v1", "features.4"), ("cnv", "features")]
)
def test_torchvision_extracts_features(uncompiled: None, name: str, node: str, training: bool) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = built(name).double().train(training)  # in float32, BatchNorm of four values magnifies what is rounded
    nodes = get_graph_node_names(model)[not training]
    last = [n for n in nodes if n.startswith(f"{node}.") or n == node][-1]
    seen: list[torch.Tensor] = []
    model.get_submodule(node).register_forward_hook(lambda *call: seen.append(call[-1]))
    found = create_feature_extractor(copy.deepcopy(model), [last])(images(4).double())[last]
    model(images(4).double())
    torch.testing.assert_close(found, seen[-1])


@pytest.fixture
def plain_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizers run uncompiled, where the test is of the layers that are fused or not: compiling takes seconds."""

    def split(x: torch.Tensor, scale: torch.Tensor, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x, fake_quant.fake_quantize(x, scale, fake_quant.IntRange(0, high))

    monkeypatch.setattr(fake_quant, "runs_compiled", lambda x: False)
    monkeypatch.setattr(norm_act, "split_rounded", split)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1", "quant_resnet20", "quant_mobilenet_v1"])
def test_hooks_of_fused_layers_fire(plain_quantizers: None, name: str) -> None:
    model = built(name).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fired: list[str] = []
    hooked = [n for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, QuantReLU)) or type(m) is nn.ReLU]
    for layer in hooked:
        model.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: fired.append(layer))
    model(images(16).contiguous(memory_format=torch.channels_last))
    assert set(fired) == set(hooked)


def channels_last(model: nn.Module) -> Any:
    return model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def batch() -> torch.Tensor:
    return images(16).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_all_modules_fire_for_each_layer(plain_quantizers: None, name: str) -> None:
    model, seen = channels_last(built(name)), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        model(batch())
    finally:
        handle.remove()
    assert {m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.MaxPool2d, nn.Conv2d))} <= seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", [lambda n: nn.GroupNorm(4, n), lambda _: nn.Identity(), FrozenBatchNorm2d])
def test_other_norms_take_the_place_of_batch_norm(plain_quantizers: None, name: str, norm: Any) -> None:
    model = built(name)
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(module, child, norm(layer.num_features))
    logits = channels_last(model)(batch())
    assert logits.shape == (16, 10)
    logits.sum().backward()


@pytest.mark.parametrize("name", QUANTIZED)
def test_second_order_gradients_of_quantized_models_are_refused(uncompiled: None, name: str) -> None:
    model, x = built(name).train(), images(4).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1"])
def test_second_order_gradients_of_models_in_contiguous_layout_are_those_of_plain_layers(name: str) -> None:
    model = built(name).double().train()
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, nn.Conv2d):
                other = nn.Conv2d(
                    layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
                    groups=layer.groups, bias=False,
                ).double()  # fmt: skip
                other.weight = layer.weight
                setattr(module, child, other)
    found = []
    for variant in (model, plain):
        x = images(4).double().requires_grad_()
        (gradient,) = torch.autograd.grad(variant(x).square().sum(), x, create_graph=True)
        variant.zero_grad()
        gradient.square().sum().backward()
        found.append([p.grad for p in variant.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8 * float(other.abs().max()))


@pytest.mark.parametrize("name", ["resnet20.cifar10", "cnv.mnist", "quant_cnv_w4a4.mnist"])
@torch.no_grad()
def test_published_weights_without_head(name: str) -> None:
    whole = cnvzoo.create_model(name, pretrained=True)
    headless = cnvzoo.create_model(name, pretrained=True, num_classes=0)
    x = images(channels=whole.in_chans)
    assert torch.equal(headless(x), whole.forward_head(whole.forward_features(x), pre_logits=True))
    assert headless.preprocessing == whole.preprocessing
    assert (headless.classes, headless.pretrained_cfg) == (None, None)  # what they say is of the head
