"""The default dtype of the process changes no run: all that is trained, published and exported is float32 as always."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cnvzoo
from cnvzoo.data import Dataset
from cnvzoo.files import sha256_of
from cnvzoo.training import recipe_from_dict


@pytest.fixture(scope="module", autouse=True)
def _plain() -> Iterator[None]:
    """Compile no loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield


def pixels(classes: int, name: str) -> Dataset:
    levels = np.arange(24 * 16 * 16 * 3, dtype=np.uint32) * 2654435761 >> 24
    images = levels.astype(np.uint8).reshape(24, 16, 16, 3)
    return Dataset.from_arrays(images, np.arange(24) % classes, [f"class {n}" for n in range(classes)], name=name)


def train(data: Path, folder: Path, name: str, **changes: Any) -> cnvzoo.TrainResult:
    recipe = {
        "name": f"{data.stem}_{name}", "model": name, "dataset": str(data), "epochs": 1, "batch_size": 9,
        "optimizer": {"lr": 0.02}, "schedule": {"warmup_epochs": 0.5},
    } | {key: value for key, value in changes.items() if key != "given"}  # fmt: skip
    arguments = {"run_dir": folder / name, "device": "cpu", "quiet": True} | changes.get("given", {})
    return cnvzoo.train(recipe_from_dict(recipe, "test"), **arguments)


def summary(model: nn.Module) -> list[Any]:
    """Types of the floating-point tensors, and the values of all."""
    state = model.state_dict()
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return [dtypes, {name: tensor.double().sum().item() for name, tensor in state.items()}]


class Stop(Exception):
    pass


def stop_after_the_first_epoch(report: cnvzoo.EpochReport) -> None:
    if report.epoch == 1:
        raise Stop


def everything(folder: Path) -> dict[str, Any]:
    """Train, resume, learn from others, start from others, save, load, verify and export: what comes out of each."""
    two, three = folder / "two.safetensors", folder / "three.safetensors"
    pixels(2, "two").save(two)
    pixels(3, "three").save(three)
    bits = {"w_bits": 2, "a_bits": 2}

    with pytest.raises(Stop):
        train(two, folder, "cnv", epochs=2, given={"on_epoch": stop_after_the_first_epoch})
    float_model = train(two, folder, "cnv", epochs=2)
    weights = folder / "cnv" / "weights.safetensors"
    given = {"float_start": weights, "teacher": weights, "run_dir": folder / "taught"}
    names = {"float_start": "two_cnv", "teacher": "two_cnv"}
    taught = train(two, folder, "quant_cnv", **bits, **names, quantize_bias=True, given=given)
    config = cnvzoo.save_checkpoint(taught, folder / "mine")
    # the same topology, and the float twin; each with a new head
    cnvzoo.save_checkpoint(float_model, folder / "float")
    starts = [
        train(three, folder, "quant_cnv", **bits, start=str(folder / source), given={"run_dir": folder / f"s-{source}"})
        for source in ("mine", "float")
    ]
    model, _ = cnvzoo.load_checkpoint(folder / "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the adapted layers
        grey, _ = cnvzoo.load_checkpoint(folder / "mine", in_chans=1)
        other, _ = cnvzoo.load_checkpoint(folder / "mine", num_classes=5)
    quantized = cnvzoo.quantize(folder / "float", w_bits=4, a_bits=4)
    (verified,) = cnvzoo.verify([folder / "mine"], dataset=two, device="cpu")
    cnvzoo.publish(folder / "mine", folder / "store")
    cnvzoo.export(folder / "mine", folder / "mine.onnx")
    results = [float_model, taught, *starts]
    return {
        "runs": [(result.record.weights_sha256, result.record.correct) for result in results],
        "results": [summary(result.model) for result in results],
        "loaded": [summary(one) for one in (model, grey, quantized)],
        "new head": summary(other)[0],
        "evaluated": cnvzoo.evaluate(model, two, device="cpu").correct,
        "verified": (verified.problem, verified.found, config.correct),
        "files": {
            str(path.relative_to(folder)): sha256_of(path)
            for path in (folder / "mine" / "model.safetensors", folder / "store" / "mine" / "model.safetensors")
        },
        "exported": sha256_of(folder / "mine.onnx"),
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return everything(tmp_path_factory.mktemp("float32"))


@pytest.mark.parametrize("dtype", [torch.float64])
def test_the_default_dtype_of_the_process_changes_nothing(
    dtype: torch.dtype, expected: dict[str, Any], tmp_path: Path
) -> None:
    torch.set_default_dtype(dtype)
    try:
        found = everything(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    for what, values in expected.items():
        assert found[what] == values, what
    assert found["results"][0][0] == {torch.float32}
