"""What evaluates, classifies with or exports a model leaves it as it was: modes, tensors, memory layout and device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cnvzoo
from cnvzoo.data import Dataset, dataset_info
from cnvzoo.models.modes import evaluating, moved, unwrapped

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("cnv", {}),
    ("resnet20", {}),
    ("mobilenet_v1", {}),
    ("quant_cnv", {"w_bits": 8, "a_bits": 8}),
    ("quant_cnv", {"w_bits": 1, "a_bits": 2}),
    ("quant_resnet20", {"w_bits": 4, "a_bits": 4}),
]


@pytest.fixture(autouse=True)
def eager(uncompiled: None) -> None:
    """Compile no loops."""


def noise(size: int = 32) -> Dataset:
    images = torch.randint(256, (3, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.zeros(3, dtype=torch.uint8)
    info = replace(dataset_info("cifar10"), train_size=3, test_size=3, image_size=size)
    return Dataset(info, images, labels, images, labels)


def with_frozen_norms(name: str, bits: dict[str, Any]) -> nn.Module:
    """In training mode, with the BatchNorms in eval mode and gradients, as in fine-tuning."""
    model = cnvzoo.create_model(name, **bits)
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.eval()
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    return model


def facts(model: nn.Module) -> list[Any]:
    """Everything about a model that a call could change."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [
        [layer.training for layer in model.modules()],
        [(id(t), t.data_ptr(), t.stride(), t.device, t.dtype, t._version) for t in tensors if t is not None],
    ]


@pytest.mark.parametrize(("name", "bits"), MODELS)
def test_evaluate_leaves_the_model_as_it_was(name: str, bits: dict[str, int], tmp_path: Path) -> None:
    model = with_frozen_norms(name, bits)
    before = facts(model)
    cnvzoo.evaluate(model, noise(), device="cpu")
    assert facts(model) == before
    save_file(model.state_dict(), tmp_path / "m.safetensors")


@pytest.mark.parametrize(("name", "bits"), MODELS)
def test_an_evaluation_that_fails_leaves_the_model_as_it_was(name: str, bits: dict[str, int]) -> None:
    def fail(*_: object) -> None:
        raise OSError("in the middle")

    model = with_frozen_norms(name, bits)
    before = facts(model)
    hook = model.register_forward_hook(fail)
    with pytest.raises(OSError, match="in the middle"):
        cnvzoo.evaluate(model, noise(), device="cpu")
    hook.remove()
    assert facts(model) == before


@pytest.mark.parametrize(
    ("name", "bits", "format"), [("quant_cnv", {"w_bits": 2, "a_bits": 2}, "integer"), ("resnet20", {}, "onnx")]
)
def test_export_leaves_the_model_as_it_was(name: str, bits: dict[str, int], format: str, tmp_path: Path) -> None:
    model = with_frozen_norms(name, bits)
    before = facts(model)
    cnvzoo.export(model, tmp_path / "m.onnx", format=format, dataset="cifar10")
    assert facts(model) == before


def test_an_export_that_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = with_frozen_norms("cnv", {})
    before = facts(model)
    with pytest.raises(cnvzoo.CnvzooError, match="float model"):
        cnvzoo.export(model, tmp_path / "m.onnx", dataset="cifar10")
    assert facts(model) == before


def test_quantize_bias_changes_beta_and_nothing_else() -> None:
    model = with_frozen_norms("quant_cnv", {"w_bits": 4, "a_bits": 4})
    before = facts(model)
    cnvzoo.quantize_bias(model)
    after = facts(model)
    assert after[0] == before[0]
    assert [t[:-1] for t in after[1]] == [t[:-1] for t in before[1]]


def test_predict_classifies_in_eval_mode_and_leaves_the_model_as_it_was(make_checkpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar10", w_bits=2, a_bits=2)
    model, _ = cnvzoo.load_checkpoint(folder)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    expected = cnvzoo.predict(model, image)
    model.train()
    model.get_submodule("features.1").eval()
    before = facts(model)
    assert cnvzoo.predict(model, image) == expected
    assert facts(model) == before


def test_after_an_error_modes_are_restored_and_shared_tensors_are_still_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[1].weight = model[0].weight
    model[2].eval()
    before = facts(model)

    def use() -> None:
        with evaluating(model), moved(model, torch.device("cpu")):
            assert not any(layer.training for layer in model.modules())
            assert {p.is_contiguous() for p in model.parameters() if p.dim() == 4} == {False}
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        use()
    assert facts(model) == before
    assert model[1].weight is model[0].weight


def test_a_model_is_returned_to_its_device() -> None:
    model = with_frozen_norms("resnet20", {})
    before = facts(model)
    with moved(model, torch.device("meta")):
        assert {p.device.type for p in model.parameters()} == {"meta"}
    assert facts(model) == before


# --- wrapped models ------------------------------------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model),  # type: ignore[return-value]
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),  # type: ignore[return-value]
}


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return WRAPPERS[request.param]


def test_a_compiled_model_is_used_without_its_wrapper(wrap, make_checkpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar10", w_bits=2, a_bits=2)
    model, _ = cnvzoo.load_checkpoint(folder)
    wrapped, data = wrap(model), noise()
    assert unwrapped(wrapped) is model
    found, expected = (cnvzoo.evaluate(m, data, device="cpu") for m in (wrapped, model))
    assert torch.equal(found.predictions, expected.predictions)
    image: Tensor = data.test_images[0].permute(2, 0, 1)
    assert cnvzoo.predict(wrapped, image) == cnvzoo.predict(model, image)
    assert torch.equal(cnvzoo.transforms(wrapped)(image), cnvzoo.transforms(model)(image))
    for name, exported in (("a.onnx", wrapped), ("b.onnx", model)):
        cnvzoo.export(exported, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    cnvzoo.quantize_bias(wrapped)


def test_a_compiled_float_model_is_exported_without_its_wrapper(wrap, tmp_path: Path) -> None:
    model = cnvzoo.create_model("cnv").eval()
    cnvzoo.export(wrap(model), tmp_path / "m.onnx", format="onnx", dataset="cifar10")
    quantized = cnvzoo.quantize(wrap(model), w_bits=4, a_bits=4, dataset="cifar10")
    expected = cnvzoo.quantize(model, w_bits=4, a_bits=4, dataset="cifar10")
    for name, value in expected.state_dict().items():
        assert torch.equal(quantized.state_dict()[name], value)
