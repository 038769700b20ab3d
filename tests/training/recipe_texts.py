"""Recipes as the text of a file, and the error of one that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cnvzoo.training import Recipe, RecipeError, load_recipe, recipe_from_dict

RESNET = """\
model: resnet20
dataset: cifar10
epochs: 10
batch_size: 128
optimizer:
  name: sgd
  lr: 0.1
schedule:
  warmup_epochs: 1
augmentation:
  flip: true
"""
QUANT = RESNET.replace("resnet20", "quant_cnv\nw_bits: 4\na_bits: 4")


def write(folder: Path, text: str, name: str = "entry") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def line_of(text: str, line: str) -> int:
    return text.splitlines().index(line) + 1


def error(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def base_recipe(**changes: Any) -> Recipe:
    """A quantized recipe with a float start and a teacher, but for `changes`."""
    values = {
        "name": "entry",
        "model": "quant_cnv",
        "dataset": "cifar10",
        "w_bits": 4,
        "a_bits": 4,
        "epochs": 10,
        "batch_size": 128,
        "optimizer": {"name": "muon", "lr": 0.1, "sgd_lr": 0.1},
        "float_start": "cifar10_cnv",
        "float_start_sha256": "1" * 64,
        "teacher": "cifar10_resnet56",
        "teacher_sha256": "1" * 64,
    }
    return recipe_from_dict(values | changes, "this test")
