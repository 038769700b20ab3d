"""The entries of the tables, read from the recipes in `configs/`, in a fixed order; and the folders of a checkout.

A recipe file is named after what it trains, `<dataset>_<model>[_w<W>a<A>].yaml`, and any other name is an error:
records, checkpoints and tables use the name. A leading underscore marks a base that other recipes extend.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cnvzoo.data.published import dataset_info
from cnvzoo.errors import CnvzooError, nearest
from cnvzoo.files import FileError, expanded
from cnvzoo.strict_yaml import StrictYamlError, YamlFile, read_yaml
from cnvzoo.training.recipe import Recipe
from cnvzoo.training.recipe_file import load_recipe


class HarnessError(CnvzooError):
    """An invalid recipe folder, reference file, record or request; the message names the remedy."""


def shown(path: Path) -> str:
    """`path` relative to the working directory if it is below that, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def set_aside(folder: Path) -> Path:
    """Rename `folder` to `<name>.previous`, replacing an earlier one, and return that path."""
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)
    return previous


def read_harness_file(path: Path) -> YamlFile:
    """Read a YAML file of the benchmarks folder. Raises HarnessError, with file and line, if it cannot be read."""
    try:
        return read_yaml(path)
    except OSError as error:
        raise HarnessError(f"{path}: cannot be read ({error.strerror}); restore it from version control") from error
    except StrictYamlError as error:
        raise HarnessError(str(error)) from None


class FileSection(BaseModel):
    """A mapping in such a file: unknown keys and values of other types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Layout:
    """The folders of one checkout.

    Attributes:
        home: the `benchmarks` folder (recipes, references, records, pages).
        runs: state and weights of runs, never committed.
        hub: published checkpoints.
    """

    home: Path
    runs: Path
    hub: Path

    @classmethod
    def of(cls, home: Path, runs: Path | None = None) -> Layout:
        """The folders of the checkout whose `benchmarks` folder is `home`, with `runs` from the command line.

        Raises HarnessError if `runs` cannot be a folder.
        """
        try:
            runs = home.parent / "runs" if runs is None else expanded(runs)
        except FileError as error:
            raise HarnessError(f"--runs {error}") from None
        existing = next(path for path in (runs, *runs.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise HarnessError(f"--runs {runs}: {existing} is a file, not a folder: choose another folder")
        return cls(home=home, runs=runs, hub=home.parent / "hub")

    @property
    def configs(self) -> Path:
        return self.home / "configs"

    @property
    def results(self) -> Path:
        return self.home / "results"

    @property
    def references(self) -> Path:
        return self.home / "references.yaml"

    @property
    def retired(self) -> Path:
        """The results of records that were replaced."""
        return self.home / "retired.json"

    @property
    def page(self) -> Path:
        return self.home / "RESULTS.md"

    def plot(self, table: str) -> Path:
        """Accuracy against bytes of the published checkpoints of a table."""
        return self.home / f"accuracy-{table}.svg"

    @property
    def readme(self) -> Path:
        return self.home.parent / "README.md"

    @property
    def cluster_page(self) -> Path:
        """The page about clusters, with the time that all runs take on one."""
        return self.home.parent / "docs" / "cluster.md"

    @property
    def index(self) -> Path:
        """The index of published checkpoints, which ships inside the package."""
        return self.home.parent / "src" / "cnvzoo" / "checkpoints" / "index.json"

    def checkpoint(self, recipe: Recipe) -> Path:
        """The published checkpoint of an entry, if it has one."""
        return self.hub / f"{recipe.tag}.{recipe.dataset}"

    def record(self, entry: str, seed: int) -> Path:
        """The committed record of a run."""
        return self.results / entry / f"seed{seed}.json"

    def run_dir(self, entry: str, seed: int, trial_epochs: int | None = None) -> Path:
        """Folder of the state and weights of a run; trials have their own, so that no table uses their weights."""
        if trial_epochs is None:
            return self.runs / entry / f"seed{seed}"
        return self.runs / "trials" / entry / f"seed{seed}-{trial_epochs}epochs"


# The models of the tables of giovannipollo/fat, in their order; quantized ones come last, most bits first.
_CIFAR_MODELS = ("mobilenet_v1", "cnv", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "quant_cnv")
_MODELS = {
    "mnist": ("resnet18", "resnet20", "mobilenet_v1", "cnv", "quant_cnv"),
    "fashion_mnist": ("resnet18", "resnet20", "mobilenet_v1", "cnv"),
    "cifar10": _CIFAR_MODELS,
    "cifar100": _CIFAR_MODELS,
}
EXTRA = "extra"  # the table of all other models, on any of these datasets
TABLES = (*_MODELS, EXTRA)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Entry:
    """One row of a table: a recipe, its file, and its fingerprint."""

    recipe: Recipe
    path: Path
    fingerprint: str

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def table(self) -> str:
        dataset, model = self.recipe.dataset, self.recipe.model
        return dataset if model in _MODELS[dataset] else EXTRA

    def trial_epochs(self, epochs: int | None) -> int | None:
        """`epochs` if fewer than the recipe's, which makes the run a trial, else None."""
        return epochs if epochs is not None and epochs < self.recipe.epochs else None


def load_entries(configs: Path) -> dict[str, Entry]:
    """Every entry of every table by name, in the order of the tables.

    Raises HarnessError for a misnamed file, a dataset without a table, or a float start or teacher that is no entry,
    and cnvzoo.training.RecipeError for a recipe that is not valid or whose float start is not beside it.
    """
    loaded = [_load_entry(path) for path in sorted(configs.glob("*.yaml")) if not path.name.startswith("_")]
    entries = {entry.name: entry for entry in sorted(loaded, key=_order)}
    for entry in loaded:
        for key, names in entry.recipe.needs.items():
            for name in names:
                if name not in entries:
                    raise HarnessError(f"{entry.path}: {key}: {name} is no entry of a table: {nearest(name, entries)}")
    return entries


def select_entries(entries: Mapping[str, Entry], table: str, names: Sequence[str] | None = None) -> list[Entry]:
    """The entries of `table` ("all": of every table), or those of them in `names`, in the order of the tables."""
    in_table = [entry for entry in entries.values() if table in ("all", entry.table)]
    if not in_table:
        raise HarnessError(f"table {table} has no recipe: its files are named {table}_<model>[_w<W>a<A>].yaml")
    if names is None:
        return in_table
    for name in names:
        if name not in entries:
            raise HarnessError(f"unknown entry {name!r}: {nearest(name, entries)}")
        if entries[name] not in in_table:
            its_table = entries[name].table
            raise HarnessError(
                f"entry {name} is in table {its_table}, not in {table}: give --table {its_table} or --table all"
            )
    return [entry for entry in in_table if entry.name in names]


def _load_entry(path: Path) -> Entry:
    recipe = load_recipe(path)
    contents = f"{recipe.dataset}_{recipe.tag}"
    if path.stem != contents:
        raise HarnessError(
            f"{path}: named {path.stem!r}, but its dataset, model and bits make {contents!r}; make the two agree, or "
            "start the file's name with an underscore if it is only a base for others"
        )
    if recipe.dataset not in _MODELS:
        raise HarnessError(f"{path}: no table has dataset {recipe.dataset!r}: {nearest(recipe.dataset, _MODELS)}")
    return Entry(recipe=recipe, path=path, fingerprint=recipe.fingerprint())


def _order(entry: Entry) -> tuple[int, int, bool, int, list[str | int], int, int]:
    recipe = entry.recipe
    models = _MODELS[recipe.dataset]
    return (
        TABLES.index(entry.table),
        TABLES.index(recipe.dataset),
        recipe.w_bits is not None,
        models.index(recipe.model) if recipe.model in models else len(models),
        [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", recipe.model)],
        -(recipe.w_bits or 0),
        -(recipe.a_bits or 0),
    )


def table_title(table: str) -> str:
    """The heading of a table."""
    return f"Other entries (`--table {EXTRA}`)" if table == EXTRA else dataset_info(table).title
