"""The registry: names, patterns, and the errors for invalid arguments and input."""

from __future__ import annotations

import copy
import enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cnvzoo.errors import CnvzooError, ModelError
from cnvzoo.models import Classifier, build_model, model_info, model_names, model_spec, register_model, unregister_model


def refusal(name: str, **arguments: Any) -> str:
    with pytest.raises(ModelError) as caught:
        build_model(name, **arguments)
    return str(caught.value)


TOPOLOGIES = ("cnv", "mobilenet_v1", "resnet18", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


def refused_input(name: str, *shape: int, **arguments: Any) -> str:
    model = build_model(name, **arguments).eval()
    with torch.no_grad(), pytest.raises(ModelError) as caught:
        model(torch.zeros(*shape))
    return str(caught.value)


def test_names_and_patterns() -> None:
    assert set(model_names()) == {f"{prefix}{name}" for prefix in ("", "quant_") for name in TOPOLOGIES}
    assert sorted(model_names("*cnv")) == ["cnv", "quant_cnv"]
    assert sorted(model_names("resnet[23]?")) == ["resnet20", "resnet32"]
    assert model_names("ResNet*") == []


def test_specs_have_input_sizes_and_twins() -> None:
    assert {n: model_spec(n).input_size for n in model_names()} == {
        n: 32 if n in ("cnv", "quant_cnv") else None for n in model_names()
    }
    assert {n for n in model_names() if model_spec(n).quantized} == {f"quant_{name}" for name in TOPOLOGIES}
    assert {model_spec(f"quant_{name}").float_twin == name for name in TOPOLOGIES} == {True}
    assert {model_spec(name).float_twin for name in TOPOLOGIES} == {None}
    assert build_model("resnet20").spec is model_spec("resnet20")


def test_errors_are_value_errors_of_the_library() -> None:
    assert issubclass(ModelError, CnvzooError)
    assert issubclass(ModelError, ValueError)


@pytest.mark.parametrize(("typed", "meant"), [("resnet21", "resnet20"), ("quantcnv", "quant_cnv"), ("CNV", None)])
def test_unknown_name_names_the_nearest_and_all(typed: str, meant: str | None) -> None:
    message = refusal(typed)
    assert repr(typed) in message
    if meant:
        hint = message.split("Choices:")[0]
        assert "did you mean" in hint
        assert repr(meant) in hint
    for name in model_names():
        assert name in message.split("Choices:")[1]


@pytest.mark.parametrize(
    ("argument", "bits", "nearest"),
    [
        ("w_bits", 0, 1), ("a_bits", 9, 8), ("first_w_bits", -3, 1), ("w_bits", 4.0, 4), ("a_bits", 3.7, 4),
        ("w_bits", True, 1), ("a_bits", "4", 4), ("w_bits", "12", 8), ("w_bits", float("-inf"), 1),
        ("first_w_bits", float("nan"), None), ("w_bits", "four", None), ("a_bits", (4,), None), ("a_bits", 10**400, 8),
    ],
)  # fmt: skip
def test_bits_that_are_not_1_to_8_are_refused(argument: str, bits: object, nearest: int | None) -> None:
    message = refusal("quant_cnv", **{"w_bits": 4, "a_bits": 4, argument: bits})
    assert f"{argument}={bits!r}" in message
    assert "whole number from 1 to 8" in message
    model = "a quantized model" if argument == "first_w_bits" else "quant_cnv"
    remedy = f": the nearest that {model} takes is {argument}={nearest}" if nearest is not None else ""
    assert message.endswith(f"whole number from 1 to 8{remedy}")


@pytest.mark.parametrize("missing", ["w_bits", "a_bits"])
def test_quantized_models_need_both_bit_widths(missing: str) -> None:
    message = refusal("quant_cnv", **{"w_bits": 4, "a_bits": 4, missing: None})
    assert missing in message
    assert "whole number from 1 to 8" in message


def test_bits_given_to_a_float_model() -> None:
    for bits in ({"w_bits": 4}, {"a_bits": 4}, {"w_bits": 4, "a_bits": 4}):
        assert "'quant_cnv'" in refusal("cnv", **bits)
    message = refusal("resnet20", w_bits=4, a_bits=4)
    assert "float model" in message
    assert "quant_cnv" not in message  # it is not the twin of a ResNet


def test_unknown_options() -> None:
    message = refusal("quant_cnv", w_bits=4, a_bits=4, first_wbits=8)
    assert "'first_wbits'" in message
    assert "did you mean 'first_w_bits'" in message
    assert "takes no further options" in refusal("resnet20", first_w_bits=8)


@pytest.mark.parametrize("count", [3.0, True, "3", None])
def test_counts_that_are_not_whole_numbers(count: object) -> None:
    for argument in ("num_classes", "in_chans"):
        assert f"{argument}={count!r} is not a whole number" in refusal("cnv", **{argument: count})


def test_counts_below_one() -> None:
    assert "num_classes=-1" in refusal("cnv", num_classes=-1)
    assert "in_chans=0" in refusal("cnv", in_chans=0)


@pytest.mark.parametrize(
    ("argument", "most"), [("num_classes", "1,000,000"), ("in_chans", "10,000"), ("input_size", "4,096")]
)
def test_counts_beyond_any_memory(argument: str, most: str) -> None:
    for count in (int(most.replace(",", "")) + 1, 10**18):
        with pytest.raises(ModelError, match=f"^{argument}={count}: {most} at most$"):
            model_info("cnv", **{argument: count})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cnv", "quant_cnv"])
def test_cnv_refuses_28x28(name: str) -> None:
    bits = {"w_bits": 2, "a_bits": 2} if name == "quant_cnv" else {}
    message = refused_input(name, 2, 1, 28, 28, in_chans=1, **bits)
    assert "28x28" in message
    assert "32x32" in message
    assert "32x32" in refused_input(name, 2, 1, 32, 28, in_chans=1, **bits)


def test_wrong_channels_name_both_counts() -> None:
    message = refused_input("resnet20", 2, 1, 32, 32)
    assert "3 channel" in message
    assert "in_chans=1" in message


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3 * 32 * 32), (1, 2, 3, 32, 32)])
def test_not_a_batch_of_images(shape: tuple[int, ...]) -> None:
    message = refused_input("cnv", *shape)
    assert "[N, 3, H, W]" in message
    assert str(list(shape)) in message


def test_too_small_images() -> None:
    assert "at least 8x8" in refused_input("resnet20", 2, 3, 4, 32)
    with torch.no_grad():
        assert build_model("resnet20").eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_a_registered_name_is_refused_until_it_is_unregistered() -> None:
    with pytest.raises(ValueError, match=r"^model 'cnv' is registered already: .* or call unregister_model\('cnv'\)"):
        register_model("cnv", summary="another")(lambda num_classes, in_chans: nn.Identity())
    assert "float" in model_spec("cnv").summary
    for classes in (3, 4):
        register_model("fixed", summary="of tests")(lambda num_classes, in_chans, n=classes: nn.Linear(in_chans, n))
        built = build_model("fixed")
        unregister_model("fixed")
        assert built.out_features == classes
    with pytest.raises(ModelError, match="unknown model 'fixed'"):
        unregister_model("fixed")


class Builder:
    def __call__(self, num_classes: int, in_chans: int) -> nn.Module:
        return nn.Linear(in_chans, num_classes)


def test_builders_of_any_kind_are_registered_if_their_options_have_names() -> None:
    for _ in range(2):  # a cell of a notebook may run twice
        register_model("object", summary="of tests")(Builder())
    built = build_model("object", num_classes=3)
    unregister_model("object")
    for copied in (copy.deepcopy(built), copy.copy(built)):  # after it
        assert copied.spec.name == "object"
    with pytest.raises(ValueError, match=r"model 'loose': the builder takes \*\*options: name each of its options"):
        register_model("loose", summary="of tests")(lambda num_classes, in_chans, **options: nn.Identity())


def test_builders_that_could_not_be_called_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^model 'fixed': the builder has no argument num_classes: it is called with "
    ):
        register_model("fixed", summary="of tests")(lambda in_chans: nn.Identity())
    says = "^model 'fixed': the builder has no argument in_chans: it is called with num_classes, in_chans$"
    with pytest.raises(ValueError, match=says):
        register_model("fixed", summary="of tests")(lambda num_classes: nn.Identity())
    with pytest.raises(ValueError, match=r"no argument num_classes: it is called with num_classes, in_chans$"):
        register_model("fixed", summary="of tests")(lambda num_classes, /, in_chans: nn.Identity())
    with pytest.raises(ValueError, match=r"no argument a_bits: .* with num_classes, in_chans, w_bits, a_bits$"):
        register_model("fixed", summary="of tests", quantized=True)(lambda num_classes, in_chans, w_bits: nn.Identity())
    assert "fixed" not in model_names()


def test_what_a_builder_lacks_or_forgets_to_return_is_named() -> None:
    def build(num_classes: int, in_chans: int, width: int) -> nn.Module:
        nn.Linear(in_chans, width)
        return None  # type: ignore[return-value]

    register_model("forgets", summary="of tests")(build)
    try:
        assert refusal("forgets") == "forgets needs width: its builder has no default for it: give width="
        says = "forgets: its builder returned NoneType, not a module: have it return the model"
        assert refusal("forgets", width=2) == says
    finally:
        unregister_model("forgets")


class Tokens(nn.Module):
    """A linear layer on 16 tokens, and a convolution that is called twice."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.patches, self.mix = nn.Conv2d(in_chans, 6, 8, 8, bias=False), nn.Linear(6, 6, bias=False)
        self.twice, self.head = nn.Conv2d(6, 6, 1, bias=False), nn.Linear(6, num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.patches(x).flatten(2).transpose(1, 2))
        x = x.transpose(1, 2).unflatten(2, (4, 4))
        return self.head(self.twice(self.twice(x)).mean((2, 3)))


def test_costs_of_a_registered_model() -> None:
    register_model("tokens", summary="of tests")(Tokens)
    try:
        info = model_info("tokens")
    finally:
        unregister_model("tokens")
    # by hand, at 16 positions: 3*6*64 + 6*6 + twice 6*6; the head has one
    assert info.macs == 16 * (1152 + 36 + 2 * 36) + 60
    assert info.weight_bytes == 4 * info.parameters == 4 * (1152 + 36 + 36 + 60)


def test_options_reach_the_builder_as_they_are_but_for_whole_numbers_of_numpy() -> None:
    class Size(enum.IntEnum):
        SMALL = 1

    given: list[Any] = []

    def build(num_classes: int, in_chans: int, size: Size, width: int, wide: bool) -> nn.Module:
        given.extend((size, width, wide))
        return nn.Conv2d(in_chans, num_classes, 1)

    register_model("enums", summary="of tests")(build)
    try:
        build_model("enums", size=Size.SMALL, width=np.int64(4), wide=True)
    finally:
        unregister_model("enums")
    assert given == [Size.SMALL, 4, True]
    assert [type(value) for value in given] == [Size, int, bool]


def test_counts_that_are_not_possible_are_explained() -> None:
    for name, remedy in (
        ("cnv", "a classifier needs at least 1 class, and a model without its last layer has 0"),
        ("tokens", "a classifier needs at least 1 class"),
    ):
        if name == "tokens":
            register_model("tokens", summary="of tests")(Tokens)
        with pytest.raises(ModelError, match=f"^num_classes=-1: {remedy}$"):
            build_model(name, num_classes=-1)
    unregister_model("tokens")


@pytest.mark.parametrize("name", ["net.v2", "my net", "../net", ""])
def test_names_that_could_not_be_found_again_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"give a name of letters, digits, _ and -"):
        register_model(name, summary="of tests")


@pytest.mark.parametrize("attribute", ["spec", "arguments", "classes", "preprocessing", "pretrained_cfg"])
@pytest.mark.parametrize("base", [nn.Module, Classifier])
def test_a_layer_with_the_name_of_an_attribute_is_refused(attribute: str, base: type[nn.Module]) -> None:
    def build(num_classes: int, in_chans: int) -> nn.Module:
        model = base()
        setattr(model, attribute, nn.Conv2d(in_chans, num_classes, 1))
        return model

    register_model("clash", summary="of tests")(build)
    try:
        with pytest.raises(ModelError, match=rf"^clash: cnvzoo sets an attribute '{attribute}' on models: give its"):
            build_model("clash")
    finally:
        unregister_model("clash")
