"""The fingerprint of a recipe: everything that decides the weights but the seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from recipe_texts import RESNET, base_recipe, write

from cnvzoo.training import EarlyCrops, Recipe, RecipeError, load_recipe, recipe_from_dict

OTHER: dict[str, Any] = {
    "early_crops": {"side": 20, "epochs": 5},
    "model": "resnet20",
    "dataset": "cifar100",
    "w_bits": 2,
    "a_bits": 2,
    "bits": {"classifier.6": (8, None)},
    "epochs": 11,
    "batch_size": 64,
    "label_smoothing": 0.1,
    "float_start": "cifar100_cnv",
    "float_start_sha256": "0" * 64,
    "start": "quant_cnv_w2a2.cifar10",
    "quantize_bias": True,
    "teacher": "cifar100_resnet56",
    "teacher_sha256": "0" * 64,
    "distillation": {"temperature": 2.0, "standardize": True, "weight": 0.5, "views": 4},
    "optimizer": {
        "name": "sgd",
        "lr": 0.2,
        "momentum": 0.8,
        "weight_decay": 1e-4,
        "sgd_lr": 0.2,
        "sgd_weight_decay": 0.0,
    },
    "schedule": {"warmup_epochs": 2.0},
    "augmentation": {
        "crop_padding": 4,
        "flip": True,
        "cutout": 8,
        "mixup": 0.2,
    },
}


def test_the_fingerprint_depends_on_every_field_but_seed_and_name() -> None:
    recipe = base_recipe().model_copy(update={"early_crops": EarlyCrops(side=24, epochs=4)})
    seen = {recipe.fingerprint()}
    changes = 0
    for field in Recipe.model_fields.keys() - {"name", "seed"}:
        value = getattr(recipe, field)
        is_section = isinstance(value, BaseModel)
        for key in OTHER[field] if is_section else [None]:
            # model_copy: a change of one field alone need not be a recipe that makes sense
            other = OTHER[field] if key is None else value.model_copy(update={key: OTHER[field][key]})
            assert other != value
            seen.add(recipe.model_copy(update={field: other}).fingerprint())
            changes += 1
        if is_section:
            assert OTHER[field].keys() == type(value).model_fields.keys()
    assert len(seen) == 1 + changes
    assert recipe.model_copy(update={"seed": 7, "name": "other"}).fingerprint() == recipe.fingerprint()


def test_keys_that_have_their_default_are_not_in_the_fingerprint() -> None:
    """So that a new key changes no fingerprint of a recipe that does without it."""
    recipe = base_recipe()
    needed = {"model", "dataset", "w_bits", "a_bits", "epochs", "batch_size", "optimizer"}
    values = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name", "seed"})
    assert values.keys() == needed | {"float_start", "float_start_sha256", "teacher", "teacher_sha256"}
    assert values["optimizer"] == {"name": "muon", "lr": 0.1, "sgd_lr": 0.1}
    assert recipe.fingerprint() == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def test_a_published_recipe_keeps_its_fingerprint() -> None:
    """Records and checkpoints name it: neither the rule nor a default may change."""
    configs = Path(__file__).resolve().parents[2] / "benchmarks" / "configs"
    known = "afea17008e4cc8c87756095c0dbe7d7a6eb851bb4af1becc5fddf8951203fea9"
    assert load_recipe(configs / "mnist_cnv.yaml").fingerprint() == known


def test_the_fingerprint_is_of_the_values_and_not_of_how_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    flat = load_recipe(write(tmp_path / "flat", RESNET + "label_smoothing: 0.1\n", "entry"))
    write(tmp_path, RESNET.replace("0.1", "0.3").replace("model: resnet20\n", ""), "_base")
    layered = "extends: _base.yaml\n# a remark\nlabel_smoothing: 1e-1\noptimizer: {lr: 0.10}\nmodel: 'resnet20'\n"
    path = write(tmp_path, layered)
    assert load_recipe(path) == flat
    assert load_recipe(path).fingerprint() == flat.fingerprint()
    explicit = load_recipe(write(tmp_path, RESNET + "label_smoothing: 0.1\nseed: 3\nearly_crops:\n", "other"))
    assert explicit.fingerprint() == flat.fingerprint()


def test_a_whole_number_for_a_float_is_the_same_recipe() -> None:
    one, exact = (base_recipe(optimizer={"lr": lr, "momentum": 0}) for lr in (1, 1.0))
    assert one.fingerprint() == exact.fingerprint()


def test_an_invalid_dict_is_refused_with_its_source() -> None:
    with pytest.raises(RecipeError, match=r"^record\.json: epochs: 0: input should be greater than or equal to 1$"):
        recipe_from_dict(base_recipe().model_dump() | {"epochs": 0}, "record.json")
    assert recipe_from_dict(base_recipe().model_dump(mode="json"), "record.json") == base_recipe()


def test_recipes_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="frozen"):
        base_recipe().epochs = 3  # type: ignore[misc]
