"""`bits`: other bit widths of single layers, from `create_model` to recipes, checkpoints and copies."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cnvzoo
from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.data import Preprocessing
from cnvzoo.errors import ModelError
from cnvzoo.models import build_model, quant
from cnvzoo.models.quant import quantizer_of
from cnvzoo.training import RecipeError, load_recipe, recipe_from_dict

SIX: dict[str, Any] = {"w_bits": 6, "a_bits": 6}
RAW = Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
RESNET: dict[str, Any] = {"name": "quant_resnet20", "num_classes": 10, "in_chans": 3, **SIX}


def widths(model: nn.Module) -> dict[str, int]:
    """The bit width of each quantized layer, by name."""
    layers = ((n, m) for n, m in model.named_modules() if hasattr(m, "weight_quant") or hasattr(m, "act_quant"))
    return {name: quantizer_of(layer).bits for name, layer in layers}


def changed(bits: Any, name: str = "quant_resnet20") -> dict[str, int]:
    """The layers whose bit width `bits` changes, with their new ones."""
    before, after = widths(build_model(name, **SIX)), widths(build_model(name, **SIX, bits=bits))
    return {layer: width for layer, width in after.items() if before.get(layer) != width}


def test_without_bits_the_widths_are_those_of_the_model() -> None:
    of_model = widths(build_model("quant_resnet20", **SIX))
    for name, width in of_model.items():
        whole = (
            name in ("input", "conv") or name.endswith("stages.0.relu") or name in ("stages.1.relu", "stages.2.relu")
        )
        assert width == (8 if whole else 6), name
    # stem, 18 convolutions, 2 shortcuts and the head; input, 3 stages' outputs, 9 blocks' inputs and inner ReLUs
    assert len(of_model) == 1 + 18 + 2 + 1 + 1 + 3 + 9 + 9


def test_a_layer_by_name() -> None:
    assert changed({"fc": (3, None)}) == {"fc": 3}
    assert changed({"fc": (3, 2)}) == {"fc": 3}  # a layer of weights has no activation bits
    assert changed({"stages.1.0.relu": (None, 2)}) == {"stages.1.0.relu": 2}
    assert changed({"conv": (5, None)}) == {"conv": 5}
    assert changed({"classifier.6": (2, None)}, "quant_cnv") == {"classifier.6": 2}


def test_the_layers_in_a_module() -> None:
    block = {"conv1": 3, "conv2": 3, "input": 2, "relu": 2}
    assert changed({"stages.0.1": (3, 2)}) == {f"stages.0.1.{layer}": width for layer, width in block.items()}
    # outputs of blocks keep their 8 bits, and the first block of a stage has a shortcut too
    assert changed({"stages.2": (3, 2)}) == {
        "stages.2.0.shortcut.0": 3,
        **{f"stages.2.{number}.{layer}": width for number in range(3) for layer, width in block.items()},
    }
    assert changed({"features.2": (3, 2)}, "quant_mobilenet_v1") == {"features.2.0": 3, "features.2.2": 2}


def test_shell_patterns_of_names() -> None:
    assert changed({"stages.?.0.conv[12]": (3, 2)}) == {f"stages.{s}.0.conv{n}": 3 for s in range(3) for n in (1, 2)}
    assert changed({"*.shortcut": (1, None)}) == {"stages.1.0.shortcut.0": 1, "stages.2.0.shortcut.0": 1}
    assert set(changed({"*": (3, 3)}).values()) == {3}
    assert set(widths(build_model("quant_resnet20", **SIX, bits={"*": (3, 3)})).values()) == {3, 8}


def test_later_ones_override_earlier_ones_and_none_leaves_as_it_is() -> None:
    assert changed({"stages": (3, None), "stages.0.0.conv1": (2, 5), "stages.0.0": (None, 4)}) == {
        **changed({"stages": (3, None)}),
        "stages.0.0.conv1": 2, "stages.0.0.input": 4, "stages.0.0.relu": 4,
    }  # fmt: skip
    assert changed({"stages.0.0.conv1": (2, 5), "stages": (3, None)}) == changed({"stages": (3, None)})
    assert changed({"*": (None, None)}) == {}


def test_at_8_bits_outputs_of_blocks_are_not_rounded_again() -> None:
    model = build_model("quant_resnet20", **SIX, bits={"stages.1": (None, 8)})
    inputs = [type(m).__name__ for n, m in model.named_modules() if n.endswith(".input")]
    assert inputs == ["PlainQuantIdentity"] * 3 + ["Identity"] * 3 + ["PlainQuantIdentity"] * 3
    low = build_model("quant_resnet20", w_bits=8, a_bits=8, bits={"stages.1": (None, 3)})
    assert [n for n in widths(low) if n.endswith(".input")] == [f"stages.1.{number}.input" for number in range(3)]


def test_scales_fit_the_bits_of_each_layer() -> None:
    torch.manual_seed(0)
    mixed = build_model("quant_resnet20", **SIX, bits={"stages.1": (2, 3), "fc": (1, None)})
    torch.manual_seed(0)
    low = build_model("quant_resnet20", w_bits=2, a_bits=3)
    torch.manual_seed(0)
    whole = build_model("quant_resnet20", **SIX)
    for name, tensor in mixed.state_dict().items():
        same = low if name.startswith("stages.1.") else whole
        if name.endswith(".scale") and not name.startswith("fc."):
            assert torch.equal(tensor, same.state_dict()[name]), name
    # of one bit, the scale of least squared error is the mean size of the weights
    head: Any = mixed.get_classifier()
    torch.testing.assert_close(quantizer_of(head).scale.detach(), head.weight.detach().abs().mean())


@pytest.mark.parametrize("name", ["quant_cnv", "quant_resnet20", "quant_mobilenet_v1"])
def test_an_unknown_layer_is_refused_with_the_nearest(name: str) -> None:
    layer = {"quant_cnv": "classifier.6", "quant_resnet20": "stages.2", "quant_mobilenet_v1": "features.3"}[name]
    refused = "names no layer whose bit width can be chosen"
    with pytest.raises(ModelError, match=rf"^bits: 'x{layer}' {refused}: did you mean.*'{layer}") as e:
        build_model(name, **SIX, bits={f"x{layer}": (2, 2)})
    assert "\n" not in str(e.value)
    with pytest.raises(ModelError, match=f"'input' {refused}"):
        build_model(name, **SIX, bits={"input": (4, 4)})


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"fc": (9, None)}, r"^bits\['fc'\]=9 is not a whole number from 1 to 8: .* takes is bits\['fc'\]=8$"),
        ({"fc": (0, 2)}, r"^bits\['fc'\]=0 is not"),
        ({"fc": (2.5, 2)}, r"^bits\['fc'\]=2.5 is not"),
        ({"fc": (True, 2)}, r"^bits\['fc'\]=True is not"),
        ({"fc": ("4", 2)}, r"^bits\['fc'\]='4' is not"),
        ({"fc": 4}, r"^bits: 'fc' has 4, not a pair of weight and activation bits, such as \(2, 4\)$"),
        ({"fc": (4,)}, r"^bits: 'fc' has \(4,\), not a pair"),
        ({"fc": (4, 4, 4)}, "^bits: 'fc' has .*not a pair"),
        ({"fc": "44"}, "^bits: 'fc' has '44', not a pair"),
        ({"fc": None}, "^bits: 'fc' has None, not a pair"),
        ([("fc", (4, 4))], r"^bits=\[.*\] is not a mapping such as"),
        ("stages.2", "^bits='stages.2' is not a mapping"),
        (4, "^bits=4 is not a mapping"),
    ],
)
def test_bits_of_another_form_are_refused(bits: Any, message: str) -> None:
    for refuse in (
        lambda: cnvzoo.create_model("quant_resnet20", **SIX, bits=bits),
        lambda: cnvzoo.model_info("quant_resnet20", **SIX, bits=bits),
        lambda: cnvzoo.quantize(build_model("resnet20"), **SIX, bits=bits, dataset="cifar10"),
    ):
        with pytest.raises(ModelError, match=message):
            refuse()


def test_float_models_have_no_bits() -> None:
    with pytest.raises(ModelError, match="resnet20 has no option 'bits'"):
        build_model("resnet20", bits={"fc": (4, 4)})


@pytest.mark.parametrize("none", [{}, None])
def test_no_bits_are_as_none_given(none: Any) -> None:
    for model in (
        cnvzoo.create_model("quant_resnet20", **SIX, bits=none),
        cnvzoo.quantize(build_model("resnet20"), **SIX, bits=none, dataset="cifar10"),
    ):
        assert "bits" not in model.arguments
        assert widths(model) == widths(build_model("quant_resnet20", **SIX))


def test_arguments_survive_json_and_pickle() -> None:
    numbers: Any = {"stages.2": (np.int64(2), np.uint8(4)), "fc": (8, None)}
    model = build_model("quant_resnet20", **SIX, bits=numbers)
    written = {"stages.2": [2, 4], "fc": [8, None]}
    assert json.loads(json.dumps(model.arguments)) == model.arguments == {**RESNET, "bits": written}
    assert list(model.arguments["bits"]) == ["stages.2", "fc"]
    again = build_model(**json.loads(json.dumps(model.arguments)))
    assert widths(again) == widths(pickle.loads(pickle.dumps(model))) == widths(model)
    again.load_state_dict(model.state_dict())
    with pytest.raises(ModelError, match=r"fc\..*scale is of 8 bits, and the model has 6 there"):
        build_model("quant_resnet20", **SIX, bits={"stages.2": (2, 4)}).load_state_dict(model.state_dict())


def test_weight_bytes_count_the_bits_of_each_layer() -> None:
    plain, mixed = (
        cnvzoo.model_info("quant_resnet20", **SIX, bits=bits) for bits in (None, {"stages.2": (2, 4), "fc": (8, None)})
    )
    third = 9 * (32 * 64 + 5 * 64 * 64) + 32 * 64
    assert plain.weight_bytes - mixed.weight_bytes == (third * (6 - 2) - 640 * (8 - 6)) // 8
    assert plain.parameters == mixed.parameters


def test_quantize_fits_other_bits_and_refits_them() -> None:
    torch.manual_seed(0)
    bits = {"stages.0": (2, 3), "fc": (3, None)}
    first = cnvzoo.quantize(build_model("resnet20"), **SIX, bits=bits, dataset="cifar10")
    assert widths(first) == widths(build_model("quant_resnet20", **SIX, bits=bits))
    assert first.arguments["bits"] == {"stages.0": [2, 3], "fc": [3, None]}
    layer: Any = first.get_submodule("stages.0.0.conv1")
    quantizer = quantizer_of(layer)
    before = quantizer.scale.clone()
    quantizer.fit(layer.weight)
    assert torch.equal(quantizer.scale, before)
    second = cnvzoo.quantize(first, w_bits=8, a_bits=8)
    assert widths(second) == widths(build_model("quant_resnet20", w_bits=8, a_bits=8))


def test_a_reset_head_has_the_bits_of_the_head() -> None:
    model = build_model("quant_resnet20", **SIX, bits={"*": (5, 4), "fc": (3, None), "stages.2": (2, 2)})
    before = widths(model)
    scales = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("scale") and not n.startswith("fc.")}
    model.reset_classifier(4)
    assert widths(model) == before
    assert before["fc"] == 3
    head: Any = model.get_classifier()
    fitted = quantizer_of(head).scale.clone()
    quantizer_of(head).fit(head.weight)
    assert torch.equal(quantizer_of(head).scale, fitted)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in scales.items())
    model.reset_classifier(0)
    headless = build_model(**model.arguments)
    for other in (model, headless):
        other.reset_classifier(2)
        assert widths(other) == before
    with pytest.raises(ModelError, match="'fd' names no layer whose bit width can be chosen"):
        build_model("quant_resnet20", num_classes=0, **SIX, bits={"fd": (3, None)})


@pytest.mark.parametrize("name", ["quant_cnv", "quant_resnet20"])
def test_a_checkpoint_keeps_the_bits(tmp_path: Path, name: str) -> None:
    last, pattern = {"quant_cnv": ("classifier.6", "features.*"), "quant_resnet20": ("fc", "stages.[12]")}[name]
    bits = {pattern: [2, 4], last: [8, None]}
    arguments = {"name": name, "num_classes": 10, "in_chans": 3, "w_bits": 3, "a_bits": 4, "bits": bits}
    model = build_model(**arguments).eval()
    config = cnvzoo.save_checkpoint(model, tmp_path / "c", preprocessing=RAW)
    assert config.model == arguments
    assert list(config.model["bits"]) == list(bits)
    loaded, read = load_checkpoint(tmp_path / "c")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert widths(loaded) == widths(model)
    assert (loaded.arguments, read) == (arguments, config)
    as_tuples = {layer: tuple(pair) for layer, pair in bits.items()}
    for given in (as_tuples, bits, {}, None):
        assert widths(cnvzoo.create_model(tmp_path / "c", pretrained=True, bits=given)) == widths(model)
    with pytest.raises(ModelError, match="its bits is"):
        cnvzoo.create_model(tmp_path / "c", pretrained=True, bits={last: (4, None)})
    with pytest.warns(UserWarning, match="num_classes=3"):
        adapted = load_checkpoint(tmp_path / "c", num_classes=3)[0]
    assert widths(adapted) == widths(model)
    assert widths(load_checkpoint(tmp_path / "c", num_classes=0)[0]) == {
        layer: width for layer, width in widths(model).items() if layer != last
    }
    cnvzoo.write_card(tmp_path / "c")
    assert "8 / unchanged" in (tmp_path / "c" / "README.md").read_text()


@pytest.mark.parametrize(
    "bits", [{}, {"fc": [9, 1]}, {"fc": [1]}, {"fc": [True, 1]}, {"fc": 3}, [], "fc", {"a b": [1, 1]}, {"f\nc": [1, 1]}]
)
def test_a_config_with_other_bits_is_refused(tmp_path: Path, bits: Any) -> None:
    model = build_model(**RESNET, bits={"fc": [2, None]})
    cnvzoo.save_checkpoint(model, tmp_path / "c", preprocessing=RAW)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["model"]["bits"] = bits
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json.*bits"):
        load_checkpoint(tmp_path / "c")


# --- recipes

RECIPE = """\
model: quant_resnet20
w_bits: 4
a_bits: 4
dataset: cifar10
epochs: 10
batch_size: 128
optimizer: {lr: 0.1}
"""


def recipe_with(folder: Path, line: str) -> Any:
    (folder / "entry.yaml").write_text(RECIPE + line)
    return load_recipe(folder / "entry.yaml")


def test_all_forms_in_a_recipe_are_one(tmp_path: Path) -> None:
    recipes = [
        recipe_with(tmp_path, "bits: {stages.2: [2, 4], fc: [8, null]}\n"),
        recipe_with(tmp_path, "bits:\n  stages.2:\n  - 2\n  - 4\n  fc: [8, ~]\n"),
    ]
    values = recipes[0].model_dump(mode="json") | {"bits": {"stages.2": (2, 4), "fc": [8, None]}}
    recipes.append(recipe_from_dict(values, "this test"))
    recipes.append(recipe_from_dict(json.loads(json.dumps(recipes[0].model_dump(mode="json"))), "this test"))
    assert all(recipe == recipes[0] for recipe in recipes)
    assert len({recipe.fingerprint() for recipe in recipes}) == 1
    assert recipes[0].bits == {"stages.2": (2, 4), "fc": (8, None)}
    assert recipes[0].bit_widths == {"w_bits": 4, "a_bits": 4, "bits": {"stages.2": [2, 4], "fc": [8, None]}}


def test_the_fingerprint_depends_on_bits_and_their_order(tmp_path: Path) -> None:
    """Later ones override earlier ones."""
    lines = ["", "bits: {stages.2: [2, 4]}", "bits: {stages.2: [2, 3]}", "bits: {'*': [3, 3], fc: [8, 8]}",
             "bits: {fc: [8, 8], '*': [3, 3]}"]  # fmt: skip
    assert len({recipe_with(tmp_path, line).fingerprint() for line in lines}) == len(lines)
    for none in ("bits: {}\n", "bits:\n"):
        assert recipe_with(tmp_path, none).fingerprint() == recipe_with(tmp_path, "").fingerprint()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bits: {fc: [9, 4]}", r"entry.yaml:8: bits: bits\['fc'\]=9 is not a whole number from 1 to 8"),
        ("bits: {fc: 4}", r"entry.yaml:8: bits: 'fc' has 4, not a pair"),
        ("bits: 4", "entry.yaml:8: bits: bits=4 is not a mapping"),
    ],
)
def test_wrong_bits_in_a_recipe_are_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_with(tmp_path, line)


def test_a_recipe_of_a_float_model_has_no_bits(tmp_path: Path) -> None:
    text = RECIPE.replace("quant_resnet20\nw_bits: 4\na_bits: 4", "resnet20")
    (tmp_path / "entry.yaml").write_text(text + "bits: {fc: [4, 4]}\n")
    with pytest.raises(RecipeError, match=r"entry.yaml:6: bits: resnet20 is a float model: leave bits out"):
        load_recipe(tmp_path / "entry.yaml")


def test_a_run_trains_the_bits_of_its_recipe(uncompiled: None, small_datasets: Any, tmp_path: Path) -> None:
    small_datasets(train=32, test=8)
    bits = {"stages.2": [2, 3], "fc": [8, None]}
    values = {
        "name": "mnist_quant_resnet20_w4a4", "model": "quant_resnet20", "w_bits": 4, "a_bits": 4, "bits": bits,
        "dataset": "mnist", "epochs": 2, "batch_size": 16, "optimizer": {"lr": 0.01}, "quantize_bias": True,
    }  # fmt: skip
    result = cnvzoo.train(recipe_from_dict(values, "test"), device="cpu", quiet=True)
    expected = widths(build_model("quant_resnet20", in_chans=1, w_bits=4, a_bits=4, bits=bits))
    assert widths(result.model) == expected
    assert result.record.recipe["bits"] == bits
    config = cnvzoo.save_checkpoint(result, tmp_path / "c")
    assert config.model["bits"] == bits
    assert widths(cnvzoo.load_checkpoint(tmp_path / "c")[0]) == expected
    for other in (bits, {}):  # the checkpoint's own bits, or others, to which its weights are fitted
        again = recipe_from_dict(values | {"start": str(tmp_path / "c"), "bits": other}, "test")
        tuned = cnvzoo.train(again, epochs=1, device="cpu", quiet=True).model
        assert widths(tuned) == widths(build_model("quant_resnet20", in_chans=1, w_bits=4, a_bits=4, bits=other))


def test_a_state_of_other_bits_is_refused_before_a_part_of_it_is_loaded() -> None:
    model, other = (build_model("quant_cnv", w_bits=bits, a_bits=4) for bits in (4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"scale is of 2 bits, and the model has 4 there"):
        model.load_state_dict(other.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ModelError, match=r"^m\.[\w.]*scale is of 2 bits, and the model has 4 there"):
        nn.ModuleDict({"m": model}).load_state_dict(nn.ModuleDict({"m": other}).state_dict())


def test_the_activation_of_a_user_is_not_fused() -> None:
    """Its forward may do something else than the quantizer."""
    layer = quant.PlainQuantReLU(quant.act_quant(quant.IntQuantizer(4, signed=False)))
    assert layer.activation_quantizer is not None
    layer.__class__ = type("Own", (quant.PlainQuantReLU,), {"__module__": __name__})
    assert layer.activation_quantizer is None


@pytest.mark.parametrize(
    ("bits", "lacks"), [({"fc": (None, 2)}, "activations"), ({"stages.0.0.relu": (2, None)}, "weights")]
)
def test_a_bit_width_of_what_the_layer_does_not_have_is_refused(bits: Any, lacks: str) -> None:
    with pytest.raises(
        ModelError, match=rf"^bits: '[\w.]+' has no {lacks}, whose bit width is given: give \(w_bits, a_b"
    ):
        build_model("quant_resnet20", **SIX, bits=bits)
