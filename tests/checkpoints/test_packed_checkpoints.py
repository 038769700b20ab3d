"""Quantized checkpoints: the file is small, and the loaded model has the logits of the trained one bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from samples import publish, registered_tiny, trained
from torch import Tensor, nn

from cnvzoo.checkpoints.folder import read_config
from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.files import sha256_of
from cnvzoo.models import build_model
from cnvzoo.models.quant import IntQuantizer, quantizer_of


@pytest.fixture
def tiny() -> Iterator[dict[str, Any]]:
    with registered_tiny() as arguments:
        yield arguments


def images(in_chans: int = 1, count: int = 16) -> Tensor:
    return torch.randint(256, (count, in_chans, 32, 32), generator=torch.Generator().manual_seed(1)) / 255


def bits_of(logits: Tensor) -> Tensor:
    return logits.contiguous().view(torch.int32 if logits.dtype == torch.float32 else torch.int16)


def assert_same_logits(loaded: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Compare logits in float32, with and without gradients, in channels_last, under autocast, and in training mode."""
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            expected = model(x)
            assert expected.std() > 0
            assert torch.equal(bits_of(loaded(x)), bits_of(expected))
            assert torch.equal(
                loaded(x.to(memory_format=torch.channels_last)), model(x.to(memory_format=torch.channels_last))
            )
    assert torch.equal(bits_of(loaded(x)), bits_of(model(x)))
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(dict(loaded.named_buffers())[name], buffer)


@pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 1), (2, 8), (3, 1), (4, 8), (5, 1), (6, 8), (7, 1), (8, 8)])
def test_logits_are_bit_identical(tmp_path: Path, tiny: dict[str, Any], w_bits: int, a_bits: int) -> None:
    arguments = {**tiny, "w_bits": w_bits, "a_bits": a_bits}
    model = trained(arguments)
    publish(tmp_path / "c", model, arguments)
    assert_same_logits(load_checkpoint(tmp_path / "c")[0], model, images())


@pytest.mark.parametrize("w_bits", [2, 8])
def test_a_complete_cnv(tmp_path: Path, w_bits: int) -> None:
    arguments = {"name": "quant_cnv", "num_classes": 10, "in_chans": 3, "w_bits": w_bits, "a_bits": w_bits}
    model = trained(arguments)
    config = publish(tmp_path / "c", model, arguments)
    assert_same_logits(load_checkpoint(tmp_path / "c")[0], model, images(3, 1))
    largest = {2: 450_000, 8: 1_600_000}[w_bits]
    assert (tmp_path / "c" / "model.safetensors").stat().st_size == config.file.size <= largest


SCALES = {
    "tiny": lambda scale: scale.fill_(3e-9),
    "negative": lambda scale: scale.mul_(-1),
    "zero": lambda scale: scale.zero_(),
    "one channel below the floor": lambda scale: scale.reshape(-1)[:1].fill_(-1e-3),
    "at the floor": lambda scale: scale.fill_(1e-8),
    "so large that every weight is 0": lambda scale: scale.fill_(1e6),
    "irrational": lambda scale: scale.mul_(2**0.5 / 3),
}


@pytest.mark.parametrize("w_bits", [1, 8])
@pytest.mark.parametrize("kind", SCALES)
def test_unusual_scales(tmp_path: Path, tiny: dict[str, Any], kind: str, w_bits: int) -> None:
    """Scales that training can produce, some of them below the minimum of the quantizer."""

    def change(model: Any) -> None:
        for layer in (model.conv, model.fc):
            SCALES[kind](quantizer_of(layer).scale)

    arguments = {**tiny, "w_bits": w_bits}
    model = trained(arguments, change)
    publish(tmp_path / "c", model, arguments)
    loaded = load_checkpoint(tmp_path / "c")[0]
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(loaded(images()), expected)
    for name, quantizer in ((n, m) for n, m in loaded.named_modules() if isinstance(m, IntQuantizer) and m.signed):
        assert (quantizer.scale > 0).all(), name


def test_dead_channels_and_activation_scales(tmp_path: Path, tiny: dict[str, Any]) -> None:
    def change(model: Any) -> None:
        model.conv.weight[2] = 0
        model.conv.weight[3] = 1e-38  # a subnormal number, divided by a scale that is subnormal too
        model.fc.weight[:, 1] = -0.0
        quantizer_of(model.relu).scale.fill_(-0.5)

    model = trained(tiny, change)
    publish(tmp_path / "c", model, tiny)
    assert_same_logits(load_checkpoint(tmp_path / "c")[0], model, images())


def test_publishing_a_loaded_model_gives_the_same_bytes(tmp_path: Path, tiny: dict[str, Any]) -> None:
    first = publish(tmp_path / "a", trained(tiny), tiny)
    second = publish(tmp_path / "b", load_checkpoint(tmp_path / "a")[0], tiny)
    assert first.file == second.file


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["conv.weight", "norm.running_var", "relu.scale", "fc.scale"])
def test_values_that_are_not_finite_are_not_published(
    tmp_path: Path, tiny: dict[str, Any], tensor: str, value: float
) -> None:
    def change(model: nn.Module) -> None:
        layer, _, kind = tensor.partition(".")
        (found,) = (t for n, t in model.state_dict().items() if n.startswith(layer) and n.endswith(kind))
        found.reshape(-1)[0] = value

    with pytest.raises(CheckpointError, match=r"run\.safetensors.*not finite") as caught:
        publish(tmp_path / "c", trained(tiny, change), tiny)
    assert tensor.partition(".")[0] in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_the_file_describes_itself(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Its metadata has bits, sign and shape, so that other programs can read the integers."""
    model = trained(tiny)
    publish(tmp_path / "c", model, tiny)
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["packed"]) == {
            "conv.weight": {"bits": 3, "signed": True, "shape": [5, 1, 3, 3]},
            "fc.weight": {"bits": 3, "signed": True, "shape": [3, 5]},
        }
        assert file.get_slice("conv.weight").get_dtype() == "U8"
        assert file.get_slice("conv.weight").get_shape() == [-(-45 * 3 // 8)]
        assert file.get_slice("fc.weight_quant.tensor_quant.scale").get_dtype() == "F32"
        assert not [name for name in file.keys() if name.endswith("num_batches_tracked")]  # noqa: SIM118


def test_loading_does_not_change_the_random_state(tmp_path: Path, tiny: dict[str, Any]) -> None:
    publish(tmp_path / "c", trained(tiny), tiny)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(tmp_path / "c")
    assert torch.equal(torch.rand(3), expected)


def test_the_weights_file_of_a_float_model_is_that_of_its_run(tmp_path: Path) -> None:
    arguments = {"name": "resnet20", "num_classes": 10, "in_chans": 1}
    config = publish(tmp_path / "c", trained(arguments), arguments)
    weights = tmp_path / "c" / "model.safetensors"
    assert sha256_of(weights) == config.weights_sha256 == config.file.sha256
    assert load_checkpoint(tmp_path / "c")[0].state_dict()["norm.num_batches_tracked"] == 77


def test_the_scale_that_divides_is_exact() -> None:
    """The quantizer scales the gradient, not the value: otherwise a stored scale would give other bits."""
    model = build_model("quant_cnv", w_bits=4, a_bits=4)
    for module in model.modules():
        if isinstance(module, IntQuantizer) and module.learned:
            x = torch.rand(max(module.scale.numel(), 1), 7, 3)
            torch.nn.init.uniform_(module.scale, -1e-8, 3e-8)
            scale = module.positive_scale(x)
            assert torch.equal(scale, module.effective_scale())
            assert torch.equal(scale, module.scale.clamp_min(1e-8))
            scale.sum().backward()
            assert module.scale.grad is not None
            assert (module.scale.grad > 0).all()


def test_a_written_config_is_read_back_unchanged(tmp_path: Path, tiny: dict[str, Any]) -> None:
    written = publish(tmp_path / "c", trained(tiny), tiny)
    config = read_config(tmp_path / "c")
    assert config == written
    weights = (tmp_path / "c" / "model.safetensors").read_bytes()
    assert (config.format_version, config.seed, config.file.size) == (1, 1, len(weights))
    assert [(r.seed, r.correct, r.total) for r in config.results] == [(0, 9000, 10_000), (1, 9123, 10_000)]
