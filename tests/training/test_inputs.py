"""The weights that a run starts or learns from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import CNV_BITS, StepHook, interrupted, noise, recipe, run

from cnvzoo.files import sha256_of
from cnvzoo.models import build_model
from cnvzoo.models.integers import quantize_bias
from cnvzoo.training import (
    RunError,
    RunInterrupted,
    RunRecord,
    count_correct,
    preprocessing_of,
)

# --- starting from a float model


FLOAT_START = CNV_BITS | {"name": "mnist_quant_cnv_w2a2", "float_start": "mnist_cnv", "optimizer": {"lr": 1e-12}}


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    folder = tmp_path_factory.mktemp("float")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # as `uncompiled`, which is of a single test
        return folder / "weights.safetensors", run(recipe(name="mnist_cnv", model="cnv"), folder, seed=5, epochs=1)


def test_biases_are_quantized_before_the_model_is_scored(tmp_path: Path, uncompiled: None) -> None:
    """Only then: the weights are those of the run without quantized biases, rounded."""
    plain = run(recipe(**CNV_BITS), tmp_path / "plain")
    record = run(recipe(**CNV_BITS, quantize_bias=True), tmp_path / "quantized")
    model = build_model("quant_cnv", in_chans=1, num_classes=10, w_bits=2, a_bits=2)
    model.load_state_dict(load_file(tmp_path / "plain" / "weights.safetensors"))
    quantize_bias(model)
    found = load_file(tmp_path / "quantized" / "weights.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    assert record.weights_sha256 != plain.weights_sha256
    data, preprocessing = noise(), preprocessing_of("quant_cnv", "mnist")
    assert record.correct == count_correct(model.eval(), data.test_images, data.test_labels, preprocessing, quiet=True)


def test_a_quantized_run_starts_from_the_weights_of_its_float_twin(
    float_run: tuple[Path, RunRecord], tmp_path: Path, uncompiled: None
) -> None:
    weights, float_record = float_run
    record = run(recipe(**FLOAT_START), tmp_path, seed=5, epochs=1, float_start=weights)
    expected = {"entry": "mnist_cnv", "seed": 0, "weights_sha256": float_record.weights_sha256}
    assert record.float_start == expected
    assert "brevitas" in record.versions
    # of a learning rate that moves nothing: all filters but the first, which takes up the normalisation
    started, given = load_file(tmp_path / "weights.safetensors"), load_file(weights)
    torch.testing.assert_close(started["classifier.0.weight"], given["classifier.0.weight"])
    torch.testing.assert_close(started["features.0.weight"], given["features.0.weight"] / 0.3081)


def test_a_deep_resnet_starts_from_the_weights_of_a_shallower_one(tmp_path: Path, uncompiled: None) -> None:
    """Of a learning rate that moves nothing: the blocks that are new, and return their input, change no class."""
    torch.manual_seed(0)
    weights = tmp_path / "resnet20.safetensors"
    save_file(build_model("resnet20", in_chans=1).state_dict(), weights)
    still = {"model": "resnet32", "name": "mnist_resnet32", "float_start": "mnist_resnet20", "optimizer": {"lr": 1e-12}}
    for seed in (0, 1):
        record = run(recipe(**still), tmp_path / f"{seed}", seed=seed, epochs=1, float_start=weights)
        assert record.float_start == {"entry": "mnist_resnet20", "seed": 0, "weights_sha256": sha256_of(weights)}
    given = load_file(weights)
    first, second = (load_file(tmp_path / f"{seed}" / "weights.safetensors") for seed in (0, 1))
    for old, new in enumerate((0, 1, 3)):
        found = first[f"stages.1.{new}.conv2.weight"]
        torch.testing.assert_close(found, given[f"stages.1.{old}.conv2.weight"])
    assert first["stages.1.2.norm2.weight"].abs().max() < 1e-9
    assert not torch.equal(first["stages.1.2.conv1.weight"], second["stages.1.2.conv1.weight"])  # drawn from the seed


def test_the_float_weights_are_part_of_the_identity_of_a_run(
    float_run: tuple[Path, RunRecord], tmp_path: Path, each_step: StepHook, uncompiled: None
) -> None:
    weights, _ = float_run
    other = tmp_path / "other.safetensors"
    save_file({name: t * 2 if t.is_floating_point() else t for name, t in load_file(weights).items()}, other)
    interrupted(recipe(**FLOAT_START), tmp_path / "run", each_step, float_start=weights)
    with pytest.raises(RunInterrupted) as caught:
        run(recipe(**FLOAT_START), tmp_path / "run", float_start=other, deadline=time.monotonic())
    assert caught.value.step == 0
    assert len(list((tmp_path / "run").glob("state-*.safetensors"))) == 1


# --- weights that a run needs, as its float start or its teacher

NEEDS: dict[str, dict[str, Any]] = {"float_start": FLOAT_START, "teacher": {"teacher": "mnist_resnet14"}}


@pytest.mark.parametrize("given", [None, "nowhere.safetensors"])
@pytest.mark.parametrize(
    ("purpose", "says"),
    [
        ("float_start", "mnist_quant_cnv_w2a2 starts from the weights of mnist_cnv, seed 0"),
        ("teacher", "mnist_resnet8 learns from the weights of mnist_resnet14, seed 0"),
    ],
)
def test_missing_weights_are_refused_with_the_entry_to_train(
    tmp_path: Path, given: str | None, purpose: str, says: str
) -> None:
    path = given and tmp_path / given
    weights: dict[str, Any] = {purpose: path}
    with pytest.raises(RunError, match="train that entry first and give its weights") as caught:
        run(recipe(**NEEDS[purpose]), tmp_path, seed=2, **weights)
    assert says in str(caught.value)
    assert str(path or "no file") in str(caught.value)


@pytest.mark.parametrize("purpose", NEEDS)
def test_weights_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purpose: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    damaged(tmp_path / "weights.safetensors")  # found, and refused when it is read
    weights: dict[str, Any] = {purpose: "~/weights.safetensors"}
    with pytest.raises(
        RunError, match=f"^{NEEDS[purpose].get('name', 'mnist_resnet8')}: {tmp_path}/weights.safetensors: "
    ):
        run(recipe(**NEEDS[purpose]), tmp_path / "run", **weights)


def weights_of(model: str, **arguments: Any) -> dict[str, torch.Tensor]:
    return {name: t.contiguous() for name, t in build_model(model, **arguments).state_dict().items()}


def damaged(path: Path) -> None:
    path.write_bytes(b"half a file")


@pytest.mark.parametrize(
    ("purpose", "write", "says"),
    [
        (
            "float_start",
            lambda path: save_file(weights_of("resnet8", in_chans=1), path),
            r"not the weights of mnist_cnv: features\.0\.weight is missing and not \[64, 1, 3, 3\] and \d+ other "
            "tensors: give the weights of mnist_cnv$",
        ),
        (
            "float_start",
            lambda path: save_file(weights_of("cnv", in_chans=3), path),
            r"features\.0\.weight is \[64, 3, 3, 3\] and not \[64, 1, 3, 3\]: give the weights of mnist_cnv$",
        ),
        ("float_start", damaged, "not a complete safetensors file: .*: give the weights of mnist_cnv$"),
        (
            "teacher",
            lambda path: save_file(weights_of("resnet8", in_chans=1), path),
            r"not the weights of mnist_resnet14: stages\.\S+ is missing and not \[.*\] and \d+ other tensors: give",
        ),
        (
            "teacher",
            lambda path: save_file(weights_of("resnet14", in_chans=3), path),
            r"conv\.weight is \[16, 3, 3, 3\] and not \[16, 1, 3, 3\]: give the weights of mnist_resnet14$",
        ),
        ("teacher", damaged, "not a complete safetensors file: .*: give the weights of mnist_resnet14$"),
    ],
    ids=[f"{purpose}-{what}" for purpose in NEEDS for what in ("another model", "another dataset", "damaged")],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, purpose: str, write: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "weights.safetensors"
    weights: dict[str, Any] = {purpose: path}
    write(path)
    wanted = recipe(**NEEDS[purpose])
    with pytest.raises(RunError, match=says) as caught:
        run(wanted, tmp_path / "run", **weights)
    assert str(path) in str(caught.value)
    assert wanted.name in str(caught.value)
