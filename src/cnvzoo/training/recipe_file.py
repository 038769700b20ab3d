"""Reading recipes from YAML files.

A recipe file may extend another (`extends: _cifar.yaml`, relative to its own folder): mappings are merged, other values
are replaced. Every error names file, line and key.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cnvzoo.data.datasets import is_dataset_path
from cnvzoo.errors import CnvzooError, nearest
from cnvzoo.files import FileError, expanded
from cnvzoo.models.registry import model_spec
from cnvzoo.recipe_folder import RecipeError, find_recipe
from cnvzoo.strict_yaml import StrictYamlError, Where, explain_with_lines, read_yaml
from cnvzoo.training.recipe import Recipe

_FILLED_IN = {
    "name": "a recipe is named after its file",
    "float_start_sha256": "it follows from float_start",
    "teacher_sha256": "it follows from teacher",
}
_GROUPS = ("bits", "schedule", "augmentation", "distillation")  # null, over what a recipe extends: the defaults
_IN_A_FILE = ("extends", *(key for key in Recipe.model_fields if key not in _FILLED_IN))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read and validate a recipe file, or a recipe of `list_recipes()`, and those that it extends or needs.

    The recipe's `name` is the file's, without extension. A leading `~` of a path is the home folder.

    Raises:
        RecipeError: a file cannot be read or is not YAML, a key is unknown, a value has the wrong type or is
            impossible.
    """
    path = expanded(find_recipe(recipe))
    return _with_needs(*_load(path), path, ())


def _with_needs(recipe: Recipe, where: Where, path: Path, chain: tuple[str, ...]) -> Recipe:
    """The recipe with the fingerprints of those that it needs; `chain`: the recipes that need this one."""
    chain = (*chain, recipe.name)
    fingerprints = {
        purpose: tuple(_load_needed(recipe, purpose, entry, path, where, chain).fingerprint() for entry in entries)
        for purpose, entries in recipe.needs.items()
    }
    start = fingerprints.get("float_start", (None,))[0]
    return recipe.model_copy(update={"float_start_sha256": start, "teacher_sha256": fingerprints.get("teacher", ())})


def _load(path: Path) -> tuple[Recipe, Where]:
    values, where = _read(path, ())
    for key, origin in _FILLED_IN.items():
        if key in values:
            raise RecipeError(f"{where[(key,)]}: {key}: {origin}: remove this line")
    values = {key: value for key, value in values.items() if value is not None or key not in _GROUPS}
    return recipe_from_dict({**values, "name": path.stem}, str(path), where), where


def _load_needed(recipe: Recipe, purpose: str, entry: str, path: Path, where: Where, chain: tuple[str, ...]) -> Recipe:
    place = f"{where[purpose,]}: {purpose}"
    source = path.parent / f"{entry}.yaml"
    if source.parent != path.parent or not os.path.isfile(source):
        recipes = sorted(p.stem for p in path.parent.glob("*.yaml") if not p.stem.startswith("_"))
        raise RecipeError(f"{place}: no recipe {entry!r} beside this one: {nearest(entry, recipes)}")
    found, found_where = _load(source)
    model = entry.removeprefix(f"{recipe.dataset_name}_")
    remedy = f"its name says {model}: rename it, or name another"
    if purpose == "float_start" and (twin := model_spec(recipe.model).float_twin):
        model = twin
        remedy = f"{recipe.model} on {recipe.dataset} can only start from its float twin, {model} on {recipe.dataset}"
    if (found.model, found.dataset) != (model, recipe.dataset):
        raise RecipeError(f"{place}: {source.name} trains {found.model} on {found.dataset}: {remedy}")
    if entry in chain:
        raise RecipeError(f"{place}: {' -> '.join((*chain, entry))}: a model cannot learn from itself")
    return _with_needs(found, found_where, source, chain)


def recipe_from_dict(values: dict[str, Any], source: str, where: Where | None = None) -> Recipe:
    """Validate `values` as a Recipe. Errors name the line that `where` has for a key, or else `source`.

    Raises:
        RecipeError: an unknown key, a wrong type or an impossible value.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        keys = _IN_A_FILE if where is not None else None
        raise RecipeError(explain_with_lines(error, Recipe, where or {}, source, keys)) from None
    except CnvzooError as error:
        raise RecipeError(f"{source}: {error}") from None


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], Where]:
    """The values of a recipe file merged over those that it extends, and the file and line of each."""
    try:
        file = read_yaml(path)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except StrictYamlError as error:
        raise RecipeError(str(error)) from None
    values, where = {} if file.values is None else file.values, file.where
    if not isinstance(values, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys to values, not {type(values).__name__}")
    for key, is_relative in (("dataset", is_dataset_path), ("start", lambda text: os.sep in text)):
        text = values.get(key)
        try:
            if isinstance(text, str) and is_relative(text) and not expanded(text).is_absolute():
                values[key] = str((path.parent / text).absolute())
        except FileError as error:
            raise RecipeError(f"{where[(key,)]}: {key}: {error}") from None
    base = values.pop("extends", None)
    if base is None:
        return values, where
    place = f"{where['extends',]}: extends"
    if not isinstance(base, str):
        raise RecipeError(f"{place}: expected a file name, not {base!r}")
    base_path, chain = path.parent / base, (*children, path.resolve())
    if not os.path.isfile(base_path):  # False for names that no system allows, too
        raise RecipeError(f"{place}: no such recipe: {base_path}")
    if base_path.resolve() in chain:
        raise RecipeError(f"{place}: extends itself, through {' -> '.join(p.name for p in chain)}")
    base_values, base_where = _read(base_path, chain)
    return _merge(base_values, values), {**base_where, **where}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
