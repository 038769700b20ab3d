"""Recipes that need others: float starts and teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_texts import QUANT, RESNET, base_recipe, error, line_of, write
from torch import nn

from cnvzoo import register_model
from cnvzoo.models.registry import unregister_model
from cnvzoo.training import EarlyCrops, Recipe, RecipeError, load_recipe, recipe_from_dict

# --- float starts


def quant_from(start: str) -> str:
    return QUANT + f"float_start: {start}\n"


def test_a_float_start_is_part_of_what_decides_the_weights(tmp_path: Path) -> None:
    twin = write(tmp_path, RESNET.replace("resnet20", "cnv"), "cifar10_cnv")
    path = write(tmp_path, quant_from("cifar10_cnv"))
    recipe = load_recipe(path)
    assert recipe.float_start_sha256 == load_recipe(twin).fingerprint()
    twin.write_text(twin.read_text().replace("epochs: 10", "epochs: 11"))
    assert load_recipe(path).fingerprint() != recipe.fingerprint()


def test_a_float_start_without_recipe_is_refused_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, RESNET.replace("resnet20", "cnv"), "cifar10_cnv")
    text = quant_from("cifar10_cnb")
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, 'float_start: cifar10_cnb')}: float_start: ")
    assert "did you mean 'cifar10_cnv'" in said


@pytest.mark.parametrize(
    "start", [RESNET, RESNET.replace("resnet20", "cnv").replace("cifar10", "cifar100")], ids=["model", "dataset"]
)
def test_a_float_start_of_another_model_or_dataset_is_refused(tmp_path: Path, start: str) -> None:
    write(tmp_path, start, "other")
    text = quant_from("other")
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, 'float_start: other')}: float_start: ")
    assert "cnv on cifar10" in said


def test_a_recipe_that_starts_from_itself_is_refused(tmp_path: Path) -> None:
    text = quant_from("entry")
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, 'float_start: entry')}: float_start: ")
    assert "can only start from its float twin, cnv on cifar10" in said


def test_a_deep_resnet_starts_from_a_shallower_one(tmp_path: Path) -> None:
    start = write(tmp_path, RESNET, "cifar10_resnet20")
    text = RESNET.replace("resnet20", "resnet56") + "float_start: cifar10_resnet20\n"
    recipe = load_recipe(path := write(tmp_path, text))
    assert recipe.needs == {"float_start": ("cifar10_resnet20",)}
    assert recipe.float_start_model == "resnet20"
    assert recipe.float_start_sha256 == load_recipe(start).fingerprint()
    start.write_text(start.read_text().replace("resnet20", "resnet32"))
    place = f"{path}:{line_of(text, 'float_start: cifar10_resnet20')}: float_start: "
    says = "cifar10_resnet20.yaml trains resnet32 on cifar10: its name says resnet20: rename it, or name another"
    assert error(path) == place + says


@pytest.mark.parametrize("start", ["cifar10_resnet56", "cifar10_resnet110", "cifar10_cnv", "cifar100_resnet20", "mine"])
def test_a_deep_resnet_that_starts_from_another_net_is_refused(tmp_path: Path, start: str) -> None:
    text = RESNET.replace("resnet20", "resnet56") + f"float_start: {start}\n"
    said = error(path := write(tmp_path, text))
    assert said == (
        f"{path}:{line_of(text, f'float_start: {start}')}: float_start: {start!r}: resnet56 can start from "
        "cifar10_resnet20, cifar10_resnet32, cifar10_resnet44"
    )


# --- teachers

RESNET56 = RESNET.replace("resnet20", "resnet56")


def taught_by(teacher: str, text: str = RESNET) -> str:
    return f"{text}teacher: {teacher}\n"


def test_a_teacher_is_part_of_what_decides_the_weights(tmp_path: Path) -> None:
    teacher = write(tmp_path, RESNET56, "cifar10_resnet56")
    alone = load_recipe(write(tmp_path, RESNET))
    path = write(tmp_path, taught_by("cifar10_resnet56"))
    recipe = load_recipe(path)
    assert recipe.teacher_sha256 == (load_recipe(teacher).fingerprint(),)
    assert recipe.teacher_models == ("resnet56",)
    found = {alone.fingerprint(), recipe.fingerprint()}
    write(tmp_path, taught_by("cifar10_resnet56") + "distillation: {temperature: 2}\n")
    found.add(load_recipe(path).fingerprint())
    write(tmp_path, taught_by("cifar10_resnet56"))
    teacher.write_text(teacher.read_text().replace("epochs: 10", "epochs: 11"))
    found.add(load_recipe(path).fingerprint())
    assert len(found) == 4


def test_several_teachers_each_decide_the_weights(tmp_path: Path) -> None:
    resnet56 = write(tmp_path, RESNET56, "cifar10_resnet56")
    resnet32 = write(tmp_path, RESNET.replace("resnet20", "resnet32"), "cifar10_resnet32")

    def fingerprint(teacher: str) -> str:
        return load_recipe(write(tmp_path, taught_by(teacher))).fingerprint()

    recipe = load_recipe(write(tmp_path, taught_by("[cifar10_resnet56, cifar10_resnet32]")))
    assert recipe.needs == {"teacher": ("cifar10_resnet56", "cifar10_resnet32")}
    assert recipe.teacher_sha256 == tuple(load_recipe(path).fingerprint() for path in (resnet56, resnet32))
    assert recipe_from_dict(recipe.model_dump(mode="json"), "a record") == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe

    both, one = recipe.fingerprint(), fingerprint("cifar10_resnet56")
    assert both not in (one, fingerprint("cifar10_resnet32"))
    assert one == fingerprint("[cifar10_resnet56]")
    assert fingerprint("[]") == fingerprint("null") == load_recipe(write(tmp_path, RESNET)).fingerprint()
    resnet32.write_text(resnet32.read_text().replace("epochs: 10", "epochs: 11"))
    assert fingerprint("[cifar10_resnet56, cifar10_resnet32]") != both


def test_the_teacher_of_a_float_start_decides_the_weights_too(tmp_path: Path) -> None:
    write(tmp_path, RESNET56, "cifar10_resnet56")
    write(tmp_path, taught_by("cifar10_resnet56", RESNET.replace("resnet20", "cnv")), "cifar10_cnv")
    path = write(tmp_path, quant_from("cifar10_cnv"))
    before = load_recipe(path).fingerprint()
    write(tmp_path, RESNET56.replace("epochs: 10", "epochs: 11"), "cifar10_resnet56")
    assert load_recipe(path).fingerprint() != before


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("cifar100_resnet56", "a teacher is an entry of the same dataset, cifar10_<model>"),
        ("resnet56", "a teacher is an entry of the same dataset, cifar10_<model>"),
        ("cifar10_resnet57", "unknown model 'resnet57': did you mean 'resnet56'"),
        ("cifar10_quant_cnv", "quant_cnv is quantized: a teacher is a float model"),
        ("cifar10_resnet32", "no recipe 'cifar10_resnet32' beside this one: did you mean 'cifar10_resnet56'"),
        ("cifar10_resnet44", "cifar10_resnet44.yaml trains resnet56 on cifar10: its name says resnet44"),
        ("[cifar10_resnet56, cifar10_resnet57]", "unknown model 'resnet57': did you mean 'resnet56'"),
        ("[cifar10_resnet56, cifar10_resnet32]", "no recipe 'cifar10_resnet32' beside this one"),
        ("[cifar10_resnet56, cifar10_resnet56]", "cifar10_resnet56 is named twice: name each teacher once"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(tmp_path: Path, teacher: str, says: str) -> None:
    write(tmp_path, RESNET56, "cifar10_resnet56")
    write(tmp_path, RESNET56, "cifar10_resnet44")
    text = taught_by(teacher)
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, f'teacher: {teacher}')}: teacher: ")
    assert says in said


def test_a_teacher_that_takes_larger_images_is_refused(tmp_path: Path) -> None:
    """CNV pads the images of MNIST to 32 x 32; a ResNet takes them as they are."""
    said = error(write(tmp_path, taught_by("mnist_cnv", RESNET.replace("cifar10", "mnist"))))
    assert "teacher: cnv takes images of another size than resnet20" in said


def test_a_recipe_that_is_its_own_teacher_is_refused(tmp_path: Path) -> None:
    write(tmp_path, taught_by("cifar10_resnet20", RESNET56), "cifar10_resnet56")
    path = write(tmp_path, taught_by("cifar10_resnet56"), "cifar10_resnet20")
    said = error(path)
    assert "cifar10_resnet20 -> cifar10_resnet56 -> cifar10_resnet20: a model cannot learn from itself" in said


@pytest.mark.parametrize(
    ("views", "augmentation", "says"),
    [
        (10, "flip: true", "10: must be below epochs, 10: each is for several epochs"),
        (4, "mixup: 0.2", "4: views cannot have mixup: leave one out"),
    ],
)
def test_impossible_views_are_refused(tmp_path: Path, views: int, augmentation: str, says: str) -> None:
    write(tmp_path, RESNET56, "cifar10_resnet56")
    line = f"distillation: {{views: {views}}}"
    text = taught_by("cifar10_resnet56", RESNET.replace("flip: true", augmentation)) + line + "\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, line)}: distillation.views: {says}")


@pytest.mark.parametrize(
    ("base", "crops", "says"),
    [
        (RESNET, "{side: 32, epochs: 5}", "early_crops.side: 32: must be 8 to 31 for resnet20"),
        (RESNET, "{side: 7, epochs: 5}", "early_crops.side: 7: must be 8 to 31 for resnet20"),
        (RESNET.replace("cifar10", "mnist"), "{side: 28, epochs: 5}", "early_crops.side: 28: must be 8 to 27"),
        (
            RESNET,
            "{side: 24, epochs: 10}",
            "early_crops.epochs: 10: must be below epochs, 10: the last ones have whole images",
        ),
        (RESNET, "{side: 24, epochs: 0}", "early_crops.epochs: 0: input should be greater than or equal to 1"),
        (RESNET, "{side: 24}", "early_crops.epochs: missing: add it"),
        (
            QUANT,
            "{side: 24, epochs: 5}",
            "early_crops: quant_cnv takes images of 32 pixels only: leave it out",
        ),
        (
            RESNET + "teacher: [cifar10_resnet56, cifar10_cnv]\n",
            "{side: 24, epochs: 5}",
            "early_crops: the teacher cnv takes whole images only: leave one out",
        ),
    ],
)
def test_impossible_early_crops_are_refused(tmp_path: Path, base: str, crops: str, says: str) -> None:
    write(tmp_path, RESNET56, "cifar10_resnet56")
    text = base + (line := f"early_crops: {crops}") + "\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, line)}: {says}")


def test_crops_that_are_too_small_for_a_teacher_are_refused() -> None:
    register_model("of_large_images", summary="of the test", min_size=28)(lambda num_classes, in_chans: nn.Flatten())
    alone: dict[str, Any] = {"w_bits": None, "a_bits": None, "float_start": None, "float_start_sha256": None}
    taught = alone | {"model": "resnet20", "teacher": "cifar10_of_large_images"}
    try:
        assert base_recipe(**taught, early_crops={"side": 28, "epochs": 5}).early_crops == EarlyCrops(side=28, epochs=5)
        with pytest.raises(RecipeError, match="side: 24: must be at least 28 for the teacher of_large_images"):
            base_recipe(**taught, early_crops={"side": 24, "epochs": 5})
    finally:
        unregister_model("of_large_images")


def test_distillation_without_a_teacher_is_refused(tmp_path: Path) -> None:
    text = RESNET + (line := "distillation: {temperature: 2}") + "\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, line)}: distillation: needs a teacher")


def test_the_fingerprint_of_the_float_start_cannot_be_written_in_a_file(tmp_path: Path) -> None:
    text = QUANT + "float_start_sha256: abc\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, 'float_start_sha256: abc')}: float_start_sha256: ")
    assert "remove this line" in said


def test_null_gives_the_defaults_back_that_a_base_has_changed(tmp_path: Path) -> None:
    write(tmp_path, RESNET56, "cifar10_resnet56")
    write(tmp_path, taught_by("cifar10_resnet56", RESNET) + "distillation: {views: 3}\n", "_base")
    groups = ("teacher", "distillation", "augmentation", "schedule")
    found = load_recipe(write(tmp_path, "extends: _base.yaml\n" + "".join(f"{key}: null\n" for key in groups)))
    assert [getattr(found, key) for key in groups] == [Recipe.model_fields[key].default for key in groups]
