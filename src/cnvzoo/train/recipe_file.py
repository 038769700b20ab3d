"""Recipes as YAML files: reading them, with all that they extend, start from and learn from.

A recipe may extend another (`extends: _cifar.yaml`, a path relative to its own file): mappings are merged,
anything else is replaced. Whatever is wrong is reported with the file and line that say it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cnvzoo.errors import CnvzooError, nearest
from cnvzoo.models import model_spec

from .recipe import Recipe

Where = dict[tuple[str, ...], str]  # key path -> "file:line"

_FILLED_IN = {
    "name": "a recipe is named after its file",
    "float_start_sha256": "it follows from float_start",
    "teacher_sha256": "it follows from teacher",
}


class RecipeError(CnvzooError, ValueError):
    """A recipe that cannot be used: says which file, key and line, what was expected and what to do."""


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe file. Its `name` is the file's stem.

    The recipes that `float_start` and `teacher` name are read too.

    Raises:
        RecipeError: not readable, not YAML, an unknown key, a wrong type or an impossible value.
    """
    path = Path(path)
    return _with_needs(*_load(path), path, ())


def _with_needs(recipe: Recipe, where: Where, path: Path, taught: tuple[str, ...]) -> Recipe:
    """The recipe with the fingerprints of those that it needs; `taught`: those that need this one."""
    taught = (*taught, recipe.name)
    fingerprints = {
        purpose: tuple(_load_needed(recipe, purpose, entry, path, where, taught).fingerprint() for entry in entries)
        for purpose, entries in recipe.needs.items()
    }
    start = fingerprints.get("float_start", (None,))[0]
    return recipe.model_copy(update={"float_start_sha256": start, "teacher_sha256": fingerprints.get("teacher", ())})


def _load(path: Path) -> tuple[Recipe, Where]:
    values, where = _read(path, ())
    for key, origin in _FILLED_IN.items():
        if key in values:
            raise RecipeError(f"{where[(key,)]}: {key}: {origin}: remove this line")
    return recipe_from_dict({**values, "name": path.stem}, str(path), where), where


def _load_needed(recipe: Recipe, purpose: str, entry: str, path: Path, where: Where, taught: tuple[str, ...]) -> Recipe:
    place = f"{where[purpose,]}: {purpose}"
    source = path.with_name(f"{entry}.yaml")
    if not source.is_file():
        recipes = sorted(p.stem for p in path.parent.glob("*.yaml") if not p.stem.startswith("_"))
        raise RecipeError(f"{place}: no recipe {entry!r} beside this one: {nearest(source.stem, recipes)}")
    found, found_where = _load(source)
    model = entry.removeprefix(f"{recipe.dataset}_")
    fits = f"{model} is what its name says"
    if purpose == "float_start":
        model = model_spec(recipe.model).float_twin
        fits = f"{recipe.model} on {recipe.dataset} can only start from its float twin, {model} on {recipe.dataset}"
    if (found.model, found.dataset) != (model, recipe.dataset):
        raise RecipeError(f"{place}: {source.name} is of {found.model} on {found.dataset}: {fits}")
    if entry in taught:
        raise RecipeError(f"{place}: {' -> '.join((*taught, entry))}: no net learns from itself")
    return _with_needs(found, found_where, source, taught)


def recipe_from_dict(values: dict[str, Any], source: str, where: Where | None = None) -> Recipe:
    """Validate `values` as a Recipe; errors name `source`, or the line that `where` gives for a key."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(dict(e), source, where or {}) for e in error.errors()]
        raise RecipeError("\n".join(lines)) from None
    except CnvzooError as error:
        raise RecipeError(f"{source}: {error}") from None


def _explain(error: dict[str, Any], source: str, where: Where) -> str:
    blamed = error["ctx"]["key"].split(".") if error["type"] == "at_key" else []
    path = tuple(str(part) for part in (*error["loc"], *blamed))
    place = next((where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in where), source)
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Recipe
        for part in path[:-1]:
            section = _section_type(section, part)
        return f"{place}: {key}: unknown key: {nearest(path[-1], section.model_fields)}"
    if error["type"] == "missing":
        return f"{place}: {key}: missing: add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "at_key"):
        return f"{place}: {key + ': ' if key else ''}{message}"
    return f"{place}: {key}: {error['input']!r}: {message[:1].lower()}{message[1:]}"


def _section_type(section: type[BaseModel], key: str) -> type[BaseModel]:
    annotation = section.model_fields[key].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number, as YAML 1.2 does and people expect."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], Where]:
    """The values of a recipe file merged over those it extends, and where each was said."""
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            where: Where = {}
            _locate(node, (), str(path), where)
            values = loader.construct_document(node) if node else {}
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys to values, not {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values, where
    place = f"{where['extends',]}: extends"
    if not isinstance(base, str):
        raise RecipeError(f"{place}: expected a file name, not {base!r}")
    base_path, chain = path.parent / base, (*children, path.resolve())
    if not base_path.is_file():
        raise RecipeError(f"{place}: no such recipe: {base_path}")
    if base_path.resolve() in chain:
        raise RecipeError(f"{place}: extends itself, through {' -> '.join(p.name for p in chain)}")
    base_values, base_where = _read(base_path, chain)
    return _merge(base_values, values), {**base_where, **where}


def _locate(node: yaml.Node | None, path: tuple[str, ...], file: str, where: Where) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        place = f"{file}:{key.start_mark.line + 1}"
        if here in where:
            raise RecipeError(f"{place}: {'.'.join(here)}: given before, at {where[here]}: keep one")
        where[here] = place
        _locate(value, here, file, where)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
