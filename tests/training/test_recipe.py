"""Recipe files: what is read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_texts import QUANT, RESNET, error, line_of, write

from cnvzoo.training import EarlyCrops, Recipe, RecipeError, load_recipe, recipe_from_dict

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
        (QUANT + "\n", "bits: []", "bits", "bits=[] is not a mapping"),
        (QUANT + "\n", "bits: false", "bits", "bits=False is not a mapping"),
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


def test_cutout_is_not_larger_than_early_crops(tmp_path: Path) -> None:
    """It would cover all of most of them."""
    text = RESNET.replace("flip: true", "cutout: 12") + "early_crops: {side: 12, epochs: 5}\n"
    assert load_recipe(write(tmp_path, text)).early_crops == EarlyCrops(side=12, epochs=5)
    text = text.replace("side: 12", "side: 11")
    said = error(path := write(tmp_path, text))
    place = f"{path}:{line_of(text, '  cutout: 12')}"
    assert said == f"{place}: augmentation.cutout: 12: must be at most 11, the side of early_crops"


@pytest.mark.parametrize("key", ["dataset", "start"])
def test_the_path_of_an_unknown_user_is_refused_by_line(tmp_path: Path, key: str) -> None:
    line = f"{key}: ~no-such-user/x"
    text = RESNET.replace("dataset: cifar10", line) if key == "dataset" else f"{RESNET}{line}\n"
    said = error(path := write(tmp_path, text))
    assert said.startswith(f"{path}:{line_of(text, line)}: {key}: ~no-such-user/x: ~no-such-user is not a known home")
