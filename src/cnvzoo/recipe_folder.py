"""The recipes that come with the package: `benchmarks/configs` of a checkout, a folder of the package when installed.

A wheel has the files of `benchmarks/configs` as `cnvzoo/recipes`; they are kept in one place only.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

from cnvzoo.errors import CnvzooError, nearest

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = (_PACKAGE.parents[1] / "benchmarks" / "configs", _PACKAGE / "recipes")
_SUFFIXES = (".yaml", ".yml")


class RecipeError(CnvzooError, ValueError):
    """A recipe that cannot be used: names file, line and key, what was expected and what to do."""


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of the recipes that come with cnvzoo and match a shell pattern such as `mnist_*`, in alphabetical order."""
    folder = recipe_folder()
    names = sorted(path.stem for path in folder.glob("*.yaml") if not path.name.startswith("_"))
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def recipe_folder() -> Path:
    """The folder of the recipes that come with cnvzoo."""
    return next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[-1])


def find_recipe(recipe: str | Path) -> Path:
    """The path of a recipe's file: of a file that is there, or of the recipe of that name that comes with cnvzoo.

    Args:
        recipe: a path; or a name, which is text without a separator and without the suffix of YAML files.

    Raises:
        RecipeError: a name that is neither a file's nor a recipe's.
    """
    path = Path(recipe)
    is_name = isinstance(recipe, str) and path.name == recipe and path.suffix not in _SUFFIXES
    if not is_name or path.is_file():
        return path
    known = list_recipes()
    if recipe not in known:
        raise RecipeError(f"no file and no recipe {str(recipe)!r}: {nearest(str(recipe), known)}")
    return recipe_folder() / f"{recipe}.yaml"
