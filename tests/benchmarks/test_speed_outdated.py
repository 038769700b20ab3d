"""Figures of other recipes or checkpoints than the current ones are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import infer
import pytest
import shared
import train

from cnvzoo.checkpoints.format import FileFacts
from cnvzoo.checkpoints.index import PublishedCheckpoint, read_index
from cnvzoo.training import load_recipe


def test_the_figures_of_this_repository_are_of_the_current_recipes_and_checkpoints() -> None:
    outdated = train.outdated_training(shared.kept("train"), train.MODELS)
    outdated += infer.outdated_inference(shared.kept("infer"), infer.REQUIRED, read_index().checkpoints)
    assert not outdated, "\n".join(["the figures in benchmarks/speed are out of date:", *outdated])


RECIPE = """\
model: resnet20
dataset: cifar10
epochs: 3
batch_size: 96
optimizer: {lr: 0.1}
early_crops: {side: 20, epochs: 2}
"""


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Any]:
    """Figures of the recipe in `tmp_path`."""
    path = tmp_path / "cifar10_resnet20.yaml"
    path.write_text(RECIPE)
    figures = {"recipe": "cifar10_resnet20", "fingerprint": train.measured_recipe(load_recipe(path)).fingerprint()}
    return {"models": {"resnet20": {**figures, "batch_size": 96, "early_crops": 20}}}


def test_figures_of_the_current_recipes_are_not_outdated(measured: dict[str, Any], tmp_path: Path) -> None:
    assert train.outdated_training(measured, ["resnet20"], tmp_path) == []


def test_figures_of_a_changed_recipe_are_outdated(measured: dict[str, Any], tmp_path: Path) -> None:
    before = measured["models"]["resnet20"]["fingerprint"][:12]
    path = tmp_path / "cifar10_resnet20.yaml"
    path.write_text(RECIPE.replace("lr: 0.1", "lr: 0.2"))  # not measured: all programs have one optimizer
    assert train.outdated_training(measured, ["resnet20"], tmp_path) == []
    path.write_text(RECIPE + "schedule: {warmup_epochs: 2}\n")
    now = train.measured_recipe(load_recipe(path)).fingerprint()[:12]
    assert train.outdated_training(measured, ["resnet20"], tmp_path) == [
        f"train.json: resnet20: fingerprint is {now}..., and {before}... was measured: "
        "run python benchmarks/speed/train.py --keep"
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"batch_size": 128}, "batch_size is 96, and 128 was measured"),
        ({"early_crops": None}, "early_crops is 20, and None was measured"),
        ({"recipe": "cifar10_cnv"}, "recipe is cifar10_resnet20, and cifar10_cnv was measured"),
    ],
)
def test_figures_of_another_recipe_are_outdated(
    measured: dict[str, Any], tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    measured["models"]["resnet20"].update(change)
    (found,) = train.outdated_training(measured, ["resnet20"], tmp_path)
    assert found == f"train.json: resnet20: {problem}: run python benchmarks/speed/train.py --keep"


def test_figures_that_do_not_state_their_recipe_are_outdated(measured: dict[str, Any], tmp_path: Path) -> None:
    del measured["models"]["resnet20"]["fingerprint"]
    (found,) = train.outdated_training(measured, ["resnet20"], tmp_path)
    assert "resnet20: fingerprint is not stated: run" in found
    (found,) = train.outdated_training({"models": {}}, ["resnet20"], tmp_path)
    assert "resnet20: was not measured: run" in found


PUBLISHED = {
    "cnv.cifar10": PublishedCheckpoint(
        model={"name": "cnv"},
        dataset="cifar10",
        correct=9_000,
        total=10_000,
        parameters=1,
        macs=1,
        files={"config.json": FileFacts("0" * 64, 1), "model.safetensors": FileFacts("a" * 64, 1)},
    )
}


def inferred(correct: int, *, runtime: str = "PyTorch float32", total: int = 10_000, sha: str = "a") -> dict[str, Any]:
    return {
        "checkpoints": {"cnv.cifar10": {"model.safetensors": 64 * sha}},
        "contenders": [
            {"runtime": runtime, "net": "cnv", "correct": correct, "total": total},
            {"runtime": "ONNX Runtime static PTQ int8", "net": "cnv", "correct": 8_000, "total": total},
        ],
    }


@pytest.mark.parametrize("correct", [8_995, 9_000, 9_005])
def test_figures_of_the_published_checkpoints_are_not_outdated(correct: int) -> None:
    names = ["cnv.cifar10", "quant_cnv_w8a8.cifar10"]  # the second is not published
    assert infer.outdated_inference(inferred(correct), names, PUBLISHED) == []


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (inferred(9_000, sha="b"), "model.safetensors is aaaaaaaaaaaa..., and bbbbbbbbbbbb... was measured"),
        (inferred(9_000) | {"checkpoints": {}}, "model.safetensors is not stated"),
        (inferred(9_006), "PyTorch float32: 9,006 of 10,000 images are correct, published are 9,000 of 10,000"),
        (inferred(8_994), "PyTorch float32: 8,994 of 10,000 images are correct"),
        (inferred(900, total=1_000), "PyTorch float32: 900 of 1,000 images are correct"),
        (inferred(9_000, runtime="another"), "no runtime of PyTorch float32, "),
        ({"contenders": []}, "was not measured"),
    ],
)
def test_figures_of_other_checkpoints_are_outdated(result: dict[str, Any], problem: str) -> None:
    (found,) = infer.outdated_inference(result, ["cnv.cifar10"], PUBLISHED)
    assert found.startswith("infer.json: cnv.cifar10")
    assert problem in found
    assert found.endswith(": run python benchmarks/speed/infer.py --keep")
