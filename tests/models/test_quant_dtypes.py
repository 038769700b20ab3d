"""Quantized models in other dtypes, in eval mode, traced, and loaded with the state of other bit widths."""

from __future__ import annotations

import copy
import io
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cnvzoo
from cnvzoo.models import fake_quant, quant
from cnvzoo.models.quant import IntQuantizer, quantizer_of

WIDTHS = [(8, 8), (4, 4), (2, 2), (1, 2)]
MODELS = [
    *(("quant_cnv", *widths) for widths in WIDTHS),
    ("quant_resnet20", 8, 8),
    ("quant_resnet20", 1, 2),
    ("quant_mobilenet_v1", 4, 4),
]
of_models = pytest.mark.parametrize(("name", "w_bits", "a_bits"), MODELS)
of_models_in_each_dtype = pytest.mark.parametrize(  # each with one dtype, and one with all
    ("name", "w_bits", "a_bits", "dtype"),
    [
        *((*model, dtype) for model, dtype in zip(MODELS, cycle((torch.float16, torch.bfloat16, torch.float64)))),
        ("quant_cnv", 8, 8, torch.bfloat16),
        ("quant_cnv", 8, 8, torch.float64),
    ],
)


@pytest.fixture
def plain(uncompiled: None) -> None:
    """Compile no loops."""


def new(w_bits: int, a_bits: int, name: str = "quant_cnv") -> nn.Module:
    """A model in eval mode, with statistics of images in its BatchNorms."""
    torch.manual_seed(0)
    model = cnvzoo.create_model(name, w_bits=w_bits, a_bits=a_bits)
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.momentum = None  # the average over all batches
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32))
    return model.eval()


def weighted(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "weight_quant")]


def activation_bits(model: nn.Module) -> dict[str, int]:
    return {n: quantizer_of(layer).bits for n, layer in model.named_modules() if hasattr(layer, "act_quant")}


@of_models_in_each_dtype
def test_exported_integers_are_those_of_the_forward_pass(
    plain: None, name: str, w_bits: int, a_bits: int, dtype: torch.dtype
) -> None:
    lowering = pytest.importorskip("cnvzoo.deploy.lowering")
    model = new(w_bits, a_bits, name).to(dtype)
    for layer in weighted(model):
        quantizer = quantizer_of(layer)
        used, scale = (t.double() for t in quantizer(layer.weight)[:2])
        assert scale.dtype == torch.float64
        expected = (used / scale).round()
        assert torch.equal(quantizer.integers(layer.weight).double(), expected)
    head = weighted(model)[-1]
    found = torch.from_numpy(lowering.integer_net(model).head.weight)
    assert torch.equal(found.double(), quantizer_of(head).integers(head.weight).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_constants_stay_float32(dtype: torch.dtype) -> None:
    model = new(4, 4, "quant_resnet20")
    before = quantizer_of(model.get_submodule("input")).scale.clone()
    scale = quantizer_of(model.to(dtype).get_submodule("input")).scale
    assert scale.dtype == torch.float32
    assert torch.equal(scale, before)


@pytest.mark.parametrize("name", ["quant_cnv", "quant_resnet20", "quant_mobilenet_v1"])
@pytest.mark.parametrize("training", [True, False])
def test_models_run_on_the_meta_device(plain: None, monkeypatch: pytest.MonkeyPatch, name: str, training: bool) -> None:
    expected = cnvzoo.model_info(name, w_bits=4, a_bits=4)
    monkeypatch.setattr(quant, "least_squares_scale", lambda *_: pytest.fail("fits scales to weights without values"))
    with torch.device("meta"):
        model = cnvzoo.create_model(name, w_bits=4, a_bits=4).train(training)
        logits = model(torch.zeros(2, 3, 32, 32))
        logits.sum().backward()
        assert cnvzoo.model_info(name, w_bits=4, a_bits=4) == expected
    assert (logits.device.type, logits.shape) == ("meta", (2, 10))


@pytest.mark.parametrize("name", ["quant_cnv", "quant_resnet20"])
def test_torch_func_gives_the_gradients_of_autograd(plain: None, name: str) -> None:
    model, images = new(4, 4, name), torch.rand(2, 3, 32, 32)
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images,)).square().mean())(parameters)
    model(images).square().mean().backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(found[key], parameter.grad, msg=key)


@pytest.mark.parametrize("name", ["mobilenet_v1", "quant_mobilenet_v1"])
def test_float64_is_left_alone_under_autocast(plain: None, name: str) -> None:
    """As autocast itself leaves it."""
    bits = 4 if name.startswith("quant_") else None
    model = cnvzoo.create_model(name, w_bits=bits, a_bits=bits).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(model(images))
    assert found[1].dtype == torch.float64
    assert torch.equal(*found)


@pytest.mark.parametrize("way", ["to_empty", "to_empty of a real model", "assign"])
def test_a_model_without_values_has_its_constants_after_loading(plain: None, way: str) -> None:
    real, images = new(4, 3, "quant_resnet20"), torch.rand(2, 3, 32, 32)
    with torch.device("cpu" if "real" in way else "meta"):
        model = cnvzoo.create_model("quant_resnet20", w_bits=4, a_bits=3).eval()
    if way == "assign":
        model.load_state_dict(real.state_dict(), assign=True)
    else:
        model.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(model(images), real(images))
    expected = dict(real.named_buffers())
    assert all(torch.equal(t, expected[n]) for n, t in model.named_buffers() if "zero_hw" not in n)  # Brevitas' own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(
    ("name", "bits"),
    [("cnv", {}), ("resnet20", {}), *((name, {"w_bits": w, "a_bits": a}) for name, w, a in MODELS if w in (1, 4))],
)
def test_the_default_dtype_of_the_process_changes_no_checkpoint(
    plain: None, make_checkpoint: Any, tmp_path: Path, name: str, bits: dict[str, int], dtype: torch.dtype
) -> None:
    folder = make_checkpoint(tmp_path / "hub", name, "cifar10", **bits)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = cnvzoo.load_checkpoint(folder)[0](images)
    torch.set_default_dtype(dtype)
    try:
        model, _ = cnvzoo.load_checkpoint(folder)
        logits = model(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert torch.equal(logits, expected)


@of_models
def test_nothing_is_compiled_in_eval_mode(monkeypatch: pytest.MonkeyPatch, name: str, w_bits: int, a_bits: int) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiles"))
    model, images = new(w_bits, a_bits, name), torch.rand(8, 3, 32, 32)
    logits = model(images)
    logits.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(images), logits)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@of_models
def test_traces_with_gradients_on(plain: None, name: str, w_bits: int, a_bits: int) -> None:
    model, images = new(w_bits, a_bits, name), torch.rand(2, 3, 32, 32)
    assert torch.is_grad_enabled()
    traced: Any = torch.jit.trace(model, images, check_trace=False)  # compared below
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = torch.rand(3, 3, 32, 32)
    assert torch.equal(torch.jit.load(file)(other), model(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["quant_cnv", "quant_resnet20", "quant_mobilenet_v1"])
def test_exports_by_tracing_with_gradients_on(plain: None, tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = new(4, 4, name), torch.rand(2, 3, 32, 32)
    torch.onnx.export(model, (images,), str(tmp_path / "m.onnx"), dynamo=False, opset_version=13)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("quant_cnv", "features.2"), ("quant_resnet20", "stages.0.0.input"), ("quant_mobilenet_v1", "features.0.2")],
)
def test_the_state_of_other_bit_widths_is_refused(tmp_path: Path, name: str, layer: str) -> None:
    seven, four = new(7, 7, name), new(4, 4, name)
    state = seven.state_dict()
    torch.save(state, tmp_path / "m.pt")
    for other in (state, copy.deepcopy(state), torch.load(tmp_path / "m.pt", weights_only=True)):
        seven.load_state_dict(other)
        with pytest.raises(cnvzoo.ModelError, match=rf"{layer}.* of 7 bits.* has 4.*cnvzoo.quantize"):
            four.load_state_dict(other)
    assert not [name for name in state if "bits" in name]


@pytest.mark.parametrize(
    ("name", "before", "w_bits", "a_bits"),
    [
        *(("quant_cnv", 8, *widths) for widths in ((4, 4), (1, 2))),
        # at 8 bits there is nothing to round at the inputs of blocks
        *(("quant_resnet20", before, *widths) for before, widths in ((8, (4, 4)), (4, (8, 8)), (4, (1, 2)))),
    ],
)
def test_quantize_refits_a_quantized_model(plain: None, name: str, before: int, w_bits: int, a_bits: int) -> None:
    source = new(before, before, name)
    refitted = cnvzoo.quantize(source, w_bits=w_bits, a_bits=a_bits)
    fresh = cnvzoo.create_model(name, w_bits=w_bits, a_bits=a_bits)
    assert list(refitted.state_dict()) == list(fresh.state_dict())
    assert activation_bits(refitted) == activation_bits(fresh)
    for old, layer in zip(weighted(source), weighted(refitted), strict=True):
        assert torch.equal(layer.weight, old.weight)
        quantizer = quantizer_of(layer)
        fitted = IntQuantizer(quantizer.bits, signed=True, scale_shape=tuple(quantizer.scale.shape))
        fitted.fit(layer.weight)
        assert torch.equal(quantizer.scale, fitted.scale)
    assert quantizer_of(weighted(refitted)[-1]).bits == w_bits


def test_integers_do_not_depend_on_the_default_dtype() -> None:
    ints = fake_quant.IntRange.of(1, signed=True)
    torch.set_default_dtype(torch.float16)
    try:
        rounded = ints.round(torch.ones(3, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert rounded.dtype == torch.float32
