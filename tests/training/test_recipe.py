"""Recipes: merged from the files they extend, and refused with the file, line, key and remedy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from torch import nn

from cnvzoo import register_model
from cnvzoo.models.registry import unregister_model
from cnvzoo.training import EarlyCrops, Recipe, RecipeError, load_recipe, recipe_from_dict

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


# --- what is read


def test_a_recipe_is_named_after_its_file_and_defaults_are_filled_in(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, RESNET, "cifar10_resnet20"))
    assert recipe.name == "cifar10_resnet20"
    assert (recipe.model, recipe.dataset, recipe.epochs, recipe.batch_size) == ("resnet20", "cifar10", 10, 128)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.sgd_lr) == ("sgd", 0.1, None)
    assert recipe.schedule.warmup_epochs == 1
    assert recipe.augmentation.flip
    assert recipe.augmentation.mixup == 0
    assert recipe.w_bits is recipe.a_bits is recipe.float_start is None
    assert (recipe.label_smoothing, recipe.seed) == (0, 0)
    assert recipe.tag == "resnet20"


def test_the_tag_of_a_quantized_recipe_has_its_bit_widths(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, QUANT.replace("a_bits: 4", "a_bits: 3")))
    assert (recipe.w_bits, recipe.a_bits, recipe.tag) == (4, 3, "quant_cnv_w4a3")


@pytest.mark.parametrize(
    ("written", "value"), [("5e-4", 5e-4), ("5E-4", 5e-4), ("1e3", 1e3), ("2.5e-2", 2.5e-2), ("+1e-2", 0.01), ("1", 1)]
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, written: str, value: float) -> None:
    path = write(tmp_path, RESNET.replace("lr: 0.1", f"lr: {written}"))
    assert load_recipe(path).optimizer.lr == value


def test_extending_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    write(tmp_path, RESNET, "_base")
    write(tmp_path, "extends: _base.yaml\nlabel_smoothing: 0.1\naugmentation: {crop_padding: 4}\nepochs: 20\n", "_mid")
    path = write(tmp_path, "extends: _mid.yaml\nmodel: cnv\nepochs: 30\noptimizer: {lr: 5e-2, momentum: 0.8}\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.model, recipe.epochs, recipe.label_smoothing) == ("entry", "cnv", 30, 0.1)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.momentum) == ("sgd", 0.05, 0.8)
    assert (recipe.augmentation.crop_padding, recipe.augmentation.flip) == (4, True)
    assert recipe.batch_size == 128


def test_a_base_is_found_beside_the_file_that_extends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(tmp_path, RESNET, "base")
    write(inner, "extends: ../base.yaml\n", "mid")
    monkeypatch.chdir(inner)
    assert load_recipe(write(tmp_path, "extends: inner/mid.yaml\n")).model == "resnet20"


def test_paths_in_a_base_are_relative_to_the_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "own").mkdir()
    text = RESNET.replace("dataset: cifar10", "dataset: ./photos\nstart: ./start")
    write(tmp_path / "base", text, "_base")
    recipe = load_recipe(write(tmp_path / "own", "extends: ../base/_base.yaml\n"))
    assert Path(recipe.dataset).resolve() == tmp_path.resolve() / "base" / "photos"
    assert Path(str(recipe.start)).resolve() == tmp_path.resolve() / "base" / "start"
    other = load_recipe(write(tmp_path / "own", "extends: ../base/_base.yaml\ndataset: ./photos\n"))
    assert other.dataset == str(tmp_path / "own" / "photos")


def test_a_recipe_whose_name_no_checkpoint_can_have_is_refused_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"name: 'lr 0.1' is not a name: .* rename the recipe"):
        load_recipe(write(tmp_path, RESNET, "lr 0.1"))


# --- what is refused: `wrong` is the line at fault


@pytest.mark.parametrize(
    ("right", "wrong", "key", "remedy"),
    [
        # unknown keys
        ("epochs: 10", "epoch: 10", "epoch", "unknown key: did you mean 'epochs'"),
        ("  lr: 0.1", "  learning: 0.1", "optimizer.learning", "unknown key: Choices: name, lr, momentum"),
        ("  flip: true", "  filp: true", "augmentation.filp", "unknown key: did you mean 'flip'"),
        ("  warmup_epochs: 1", "  warmup: 1", "schedule.warmup", "unknown key: did you mean 'warmup_epochs'"),
        # wrong types: nothing is converted on the quiet
        ("epochs: 10", "epochs: ten", "epochs", "'ten': input should be a valid integer"),
        ("epochs: 10", "epochs: 10.0", "epochs", "10.0: input should be a valid integer"),
        ("epochs: 10", "epochs: true", "epochs", "True: input should be a valid integer"),
        ("epochs: 10", "epochs:", "epochs", "None: input should be a valid integer"),
        ("epochs: 10", "epochs: 010", "epochs", "010: a leading zero, octal in YAML 1.1: write 10, or 8 if it"),
        ("epochs: 10", "epochs: 1:30", "epochs", "'1:30': input should be a valid integer"),
        ("epochs: 10", "epochs: 1_0", "epochs", "'1_0': input should be a valid integer"),
        ("epochs: 10", "epochs: 2026-11-26", "epochs", "'2026-11-26': input should be a valid integer"),
        ("epochs: 10", f"epochs: {'9' * 5000}", "epochs", "a number of 5,000 characters: write it with at most 40"),
        ("epochs: 10", f"epochs: {'x' * 5000}", "epochs", f"'{'x' * 76}...: input should be a valid integer"),
        ("  flip: true", "  flip: yes", "augmentation.flip", "'yes': input should be a valid boolean"),
        ("  lr: 0.1", "  lr: '0.1'", "optimizer.lr", "'0.1': input should be a valid number"),
        ("  flip: true", "  flip: 1", "augmentation.flip", "1: input should be a valid boolean"),
        ("model: resnet20", "model: [cnv]", "model", "['cnv']: input should be a valid string"),
        # impossible values
        ("epochs: 10", "epochs: 0", "epochs", "0: input should be greater than or equal to 1"),
        ("batch_size: 128", "batch_size: 1", "batch_size", "1: input should be greater than or equal to 2"),
        ("  lr: 0.1", "  lr: 0", "optimizer.lr", "0: input should be greater than 0"),
        ("  lr: 0.1", "  lr: -5e-4", "optimizer.lr", "-0.0005: input should be greater than 0"),
        ("  lr: 0.1", "  lr: .inf", "optimizer.lr", "inf: input should be a finite number"),
        ("  lr: 0.1", "  lr: .nan", "optimizer.lr", "nan: input should be a finite number"),
        ("  name: sgd", "  name: adam", "optimizer.name", "'adam': input should be 'sgd' or 'muon'"),
        ("  warmup_epochs: 1", "  warmup_epochs: -1", "schedule.warmup_epochs", "greater than or equal to 0"),
        ("  flip: true", "  crop_padding: -1", "augmentation.crop_padding", "greater than or equal to 0"),
        ("  flip: true", "  cutout: -1", "augmentation.cutout", "greater than or equal to 0"),
        # what the dataset has no images for
        ("batch_size: 128", "batch_size: 50001", "batch_size", "50001: must be at most 50000, the training images of"),
        ("  flip: true", "  crop_padding: 32", "augmentation.crop_padding", "32: must be below 32, the side of the im"),
        ("  flip: true", "  cutout: 33", "augmentation.cutout", "33: must be at most 32, the side of the images"),
        ("  flip: true", "  mixup: -0.1", "augmentation.mixup", "greater than or equal to 0"),
        # values that are wrong in the light of others
        ("model: resnet20", "model: resnet21", "model", "unknown model 'resnet21': did you mean 'resnet"),
        ("dataset: cifar10", "dataset: cifar", "dataset", "unknown dataset 'cifar': did you mean 'cifar10'"),
        ("epochs: 10", "epochs: 1", "epochs", "1: must be above schedule.warmup_epochs, 1"),
        ("model: resnet20", "model: quant_cnv", "model", "needs w_bits and a_bits"),
        ("  name: sgd", "  name: muon", "optimizer.name", "name: muon needs sgd_lr"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path: Path, right: str, wrong: str, key: str, remedy: str) -> None:
    text = RESNET.replace(right, wrong)
    said = error(path := write(tmp_path, text)).splitlines()
    (about_it,) = [line for line in said if remedy in line]
    assert about_it.startswith(f"{path}:{line_of(text, wrong)}: {key}: ")


@pytest.mark.parametrize(("model", "side"), [("resnet20", 28), ("cnv", 32)])
def test_augmentation_fits_the_images_as_the_model_takes_them(tmp_path: Path, model: str, side: int) -> None:
    text = RESNET.replace("cifar10", "mnist").replace("resnet20", model)
    for key, most in (("crop_padding", side - 1), ("cutout", side)):
        path = write(tmp_path, text.replace("flip: true", f"{key}: {most}"))
        assert getattr(load_recipe(path).augmentation, key) == most
        said = error(write(tmp_path, text.replace("flip: true", f"{key}: {most + 1}")))
        assert f"augmentation.{key}: {most + 1}: must be " in said
        assert f"{side}, the side of the images" in said


@pytest.mark.parametrize(("epochs", "warmup", "fits"), [(10, 9.9, True), (10, 10, False), (10, 10.5, False)])
def test_a_warm_up_leaves_some_epochs_to_train(tmp_path: Path, epochs: int, warmup: float, fits: bool) -> None:
    path = write(tmp_path, RESNET.replace("warmup_epochs: 1", f"warmup_epochs: {warmup}"))
    if fits:
        assert load_recipe(path).schedule.warmup_epochs == warmup
    else:
        assert error(path).startswith(f"{path}:3: epochs: {epochs}: must be above schedule.warmup_epochs, {warmup}")


@pytest.mark.parametrize(
    ("base", "added", "key", "remedy"),
    [
        (RESNET, "label_smoothing: 1", "label_smoothing", "less than 1"),
        (RESNET, "label_smoothing: -0.1", "label_smoothing", "greater than or equal to 0"),
        (RESNET, "seed: -1", "seed", "greater than or equal to 0"),
        (RESNET, "seed: 9223372036854775808", "seed", "less than or equal to 9223372036854775807"),
        (RESNET, "float_start: cifar10_cnv", "float_start", "resnet20 is a float model: leave float_start out"),
        (RESNET, "w_bits: 4", "w_bits", "resnet20 is a float model: leave w_bits out"),
        (RESNET, "a_bits: 4", "a_bits", "resnet20 is a float model: leave a_bits out"),
        (RESNET, "quantize_bias: true", "quantize_bias", "resnet20 is a float model: leave quantize_bias out"),
        (RESNET, "name: other", "name", "a recipe is named after its file: remove this line"),
        (QUANT.replace("w_bits: 4\n", ""), "w_bits: 9", "w_bits", "less than or equal to 8"),
        (QUANT.replace("w_bits: 4\n", ""), "w_bits: 0", "w_bits", "greater than or equal to 1"),
        (QUANT.replace("a_bits: 4\n", ""), "a_bits: 0", "a_bits", "greater than or equal to 1"),
        (QUANT.replace("a_bits: 4\n", ""), "a_bits: 2.0", "a_bits", "input should be a valid integer"),
    ],
)
def test_an_added_line_is_refused(tmp_path: Path, base: str, added: str, key: str, remedy: str) -> None:
    text = base + added + "\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, added)}: {key}: ")
    assert remedy in said


@pytest.mark.parametrize(
    ("added", "remedy"),
    [
        ("  momentum: 1", "less than 1"),
        ("  momentum: -0.1", "greater than or equal to 0"),
        ("  weight_decay: -1e-4", "greater than or equal to 0"),
        ("  weight_decay: .inf", "finite number"),
        ("  sgd_lr: 0", "greater than 0"),
        ("  sgd_lr: 0.1", "no other optimizer takes it"),
        ("  sgd_weight_decay: -1e-4", "greater than or equal to 0"),
        ("  sgd_weight_decay: 0", "only name: muon takes sgd_weight_decay: leave it out"),
    ],
)
def test_an_added_line_of_the_optimizer_is_refused(tmp_path: Path, added: str, remedy: str) -> None:
    text = RESNET.replace("  lr: 0.1", f"  lr: 0.1\n{added}")
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, added)}: optimizer.{added.split(':')[0].strip()}: ")
    assert remedy in said


@pytest.mark.parametrize("missing", ["w_bits", "a_bits"])
def test_a_quantized_model_needs_both_bit_widths(tmp_path: Path, missing: str) -> None:
    text = QUANT.replace(f"{missing}: 4\n", "")
    assert f"{write(tmp_path, text)}:1: model: " in (said := error(tmp_path / "entry.yaml"))
    assert "quant_cnv needs w_bits and a_bits" in said


def test_missing_keys_are_all_named_with_their_section(tmp_path: Path) -> None:
    text = "model: cnv\nschedule: {warmup_epochs: 1}\noptimizer:\n  name: sgd\n"
    said = error(path := write(tmp_path, text)).splitlines()
    assert f"{path}:3: optimizer.lr: missing: add it" in said
    for key in ("dataset", "epochs", "batch_size"):
        assert f"{path}: {key}: missing: add it" in said
    assert len(said) == 4


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    text = RESNET.replace("epochs: 10", "epochs: -1").replace("flip", "flap").replace("lr: 0.1", "lr: fast")
    lines = error(write(tmp_path, text)).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["epochs", "optimizer.lr", "augmentation.flap"]


@pytest.mark.parametrize(
    ("wrong", "key"), [("  nestrov: true", "optimizer.nestrov"), ("  weight_decay: much", "optimizer.weight_decay")]
)
def test_a_mistake_in_a_base_file_is_reported_for_that_file(tmp_path: Path, wrong: str, key: str) -> None:
    base = RESNET.replace("  lr: 0.1", f"  lr: 0.1\n{wrong}")
    base_path = write(tmp_path, base, "_base")
    path = write(tmp_path, "# a comment\nextends: _base.yaml\noptimizer: {lr: 0.2}\n")
    said = error(path)
    assert said.startswith(f"{base_path}:{line_of(base, wrong)}: {key}: ")


def test_a_wrong_value_that_overrides_the_base_is_reported_for_the_overriding_file(tmp_path: Path) -> None:
    write(tmp_path, RESNET, "_base")
    path = write(tmp_path, "extends: _base.yaml\noptimizer:\n  lr: 0\n")
    assert error(path).startswith(f"{path}:3: optimizer.lr: 0: ")


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        (RESNET + "epochs: 20\n", 12, "epochs", 3),
        (RESNET + "  flip: false\n", 12, "augmentation.flip", 11),
        (RESNET + "  ? flip\n  : false\n", 12, "augmentation.flip", 11),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, line: int, key: str, first: int) -> None:
    path = write(tmp_path, text)
    assert error(path) == f"{path}:{line}: {key}: repeated key, first at {path}:{first}: keep one"


def test_a_key_that_is_given_in_the_base_too_is_no_duplicate(tmp_path: Path) -> None:
    write(tmp_path, RESNET, "_base")
    assert load_recipe(write(tmp_path, "extends: _base.yaml\nepochs: 3\n")).epochs == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- model\n- dataset\n", "a recipe is a mapping of keys to values, not list"),
        ("resnet20\n", "a recipe is a mapping of keys to values, not str"),
        (RESNET + "seed: [1, 2\n", "not valid YAML: expected ',' or ']'"),
        (RESNET + "\tepochs: 3\n", "not valid YAML: found character '\\t' that cannot start any token"),
        (RESNET + "tags: !!python/object:os.system {}\n", "tags: a tag (tag:yaml.org,2002:python/object:os.system)"),
        ("", "model: missing: add it"),
        ("a: &a {b: *a}\n", "a: an anchor (&a): write the value out"),
        (RESNET + "extends: [one, two]\n", "extends: expected a file name, not ['one', 'two']"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, says: str) -> None:
    said = error(path := write(tmp_path, text))
    assert said.startswith(str(path))
    assert says in said


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "entry.yaml"
    path.write_bytes(b"\xff\xfe model")
    assert error(path) == f"{path}:1: not UTF-8 text: save it as UTF-8"
    assert error(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize("key", ["extends", "float_start"])
@pytest.mark.parametrize("name", ["x" * 5000, '"a\\0b"', "_sub/none"])
def test_a_name_that_no_file_can_have_is_refused_by_line(tmp_path: Path, key: str, name: str) -> None:
    text = f"{QUANT}{key}: {name}\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, f'{key}: {name}')}: {key}: no ")


def test_an_unknown_key_of_an_optional_section_is_refused_with_the_nearest(tmp_path: Path) -> None:
    text = RESNET + "early_crops: {sied: 24, epochs: 4}\n"
    said = error(path := write(tmp_path, text)).splitlines()
    assert f"{path}:12: early_crops.sied: unknown key: did you mean 'side'? Choices: side, epochs" in said


def test_an_unknown_key_is_refused_with_the_keys_that_a_file_may_have(tmp_path: Path) -> None:
    said = error(path := write(tmp_path, "extend: _base.yaml\n" + RESNET))
    hint, _, choices = said.partition(" Choices: ")
    assert hint == f"{path}:1: extend: unknown key: did you mean 'extends' or 'seed'?"
    filled_in = {"name", "float_start_sha256", "teacher_sha256"}
    assert set(choices.split(", ")) == {"extends", *Recipe.model_fields} - filled_in
    with pytest.raises(RecipeError, match=r"^here: unknown: unknown key: Choices: name, model, [^\n]*teacher_sha256"):
        recipe_from_dict(load_recipe(write(tmp_path, RESNET)).model_dump(mode="json") | {"unknown": 1}, "here")


def test_a_recipe_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, RESNET)
    assert load_recipe("~/entry.yaml") == load_recipe(Path("~/entry.yaml")) == load_recipe(tmp_path / "entry.yaml")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    assert error(tmp_path / "nowhere.yaml") == f"{tmp_path / 'nowhere.yaml'}: no such recipe"


def test_a_missing_base_is_named_with_the_file_that_extends_it(tmp_path: Path) -> None:
    said = error(path := write(tmp_path, "# a comment\nextends: _bse.yaml\n"))
    assert said == f"{path}:2: extends: no such recipe: {tmp_path / '_bse.yaml'}"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_recipes_that_extend_each_other_in_a_loop_are_refused(tmp_path: Path, length: int) -> None:
    for i in range(length):
        write(tmp_path, f"extends: r{(i + 1) % length}.yaml\n", f"r{i}")
    said = error(tmp_path / "r0.yaml")
    chain = " -> ".join(f"r{i}.yaml" for i in range(length))
    assert said == f"{tmp_path / f'r{length - 1}.yaml'}:1: extends: extends itself, through {chain}"


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


# --- the fingerprint


def base_recipe(**changes: Any) -> Recipe:
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


def test_cutout_is_not_larger_than_early_crops(tmp_path: Path) -> None:
    """It would cover all of most of them."""
    text = RESNET.replace("flip: true", "cutout: 12") + "early_crops: {side: 12, epochs: 5}\n"
    assert load_recipe(write(tmp_path, text)).early_crops == EarlyCrops(side=12, epochs=5)
    text = text.replace("side: 12", "side: 11")
    said = error(path := write(tmp_path, text))
    place = f"{path}:{line_of(text, '  cutout: 12')}"
    assert said == f"{place}: augmentation.cutout: 12: must be at most 11, the side of early_crops"


def test_null_gives_the_defaults_back_that_a_base_has_changed(tmp_path: Path) -> None:
    write(tmp_path, RESNET56, "cifar10_resnet56")
    write(tmp_path, taught_by("cifar10_resnet56", RESNET) + "distillation: {views: 3}\n", "_base")
    groups = ("teacher", "distillation", "augmentation", "schedule")
    found = load_recipe(write(tmp_path, "extends: _base.yaml\n" + "".join(f"{key}: null\n" for key in groups)))
    assert [getattr(found, key) for key in groups] == [Recipe.model_fields[key].default for key in groups]


@pytest.mark.parametrize("key", ["dataset", "start"])
def test_the_path_of_an_unknown_user_is_refused_by_line(tmp_path: Path, key: str) -> None:
    line = f"{key}: ~no-such-user/x"
    text = RESNET.replace("dataset: cifar10", line) if key == "dataset" else f"{RESNET}{line}\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, line)}: {key}: ~no-such-user/x: ~no-such-user is not a known home")
