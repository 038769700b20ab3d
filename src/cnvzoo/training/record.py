"""Run records: one JSON file per finished run. Tables are made from records alone.

A record holds all that decides the weights of a run (recipe, seed, data, machine, versions, commit) and what it came
to: accuracy, history and the sha256 of the weights. It is validated as a whole when it is read.
"""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cnvzoo.data.datasets import is_dataset_path
from cnvzoo.data.published import dataset_info, published_sha256
from cnvzoo.errors import CnvzooError, explain
from cnvzoo.files import write_text
from cnvzoo.training.numerics import Machine
from cnvzoo.training.recipe import LARGEST_SEED, Recipe

_PACKAGE = Path(__file__).resolve().parents[1]


def current_commit(package: Path = _PACKAGE) -> str | None:
    """The commit of a checkout, with a `+` appended if the package in it has other changes.

    None where the package is not in a checkout of its own repository, or git is not installed.

    Args:
        package: `src/cnvzoo` of the checkout; default the package that runs.
    """

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=package, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parents[1]:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(package)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


_LARGEST_RECORD = 1 << 22  # bytes; a history of 10,000 epochs is below 1.5 MiB


class RecordError(CnvzooError, ValueError):
    """A file that is not a valid run record: names the file and what is wrong with it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EpochRecord(_Section):
    """One epoch of a run: number (from 1), mean training loss, learning rate of the last step, seconds.

    And, where the run validated, the accuracy in percent on held-out images.
    """

    epoch: float = Field(ge=1)
    loss: float
    lr: float = Field(ge=0)
    seconds: float = Field(ge=0)
    validation_accuracy: float | None = Field(default=None, ge=0, le=100)


class InputRecord(_Section):
    """Float weights that a run starts or learns from: entry, seed and sha256 of the file."""

    entry: str
    seed: int = Field(ge=0, le=LARGEST_SEED)
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")


class StartRecord(_Section):
    """The checkpoint that a run starts from: name or path, and sha256 of its weights file."""

    checkpoint: str
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")


def _checked(section: type[BaseModel]) -> AfterValidator:
    """Validates a mapping as a `section`, and keeps it a mapping, with the keys that were written."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        section.model_validate(values)
        return values

    return AfterValidator(check)


_Input = Annotated[dict[str, Any], _checked(InputRecord)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(min_length=1, max_length=200)]


def _time(text: str) -> str:
    datetime.fromisoformat(text)  # the pattern allows a 99th of a 13th month
    return text


class RunRecord(BaseModel):
    """One finished run.

    Attributes:
        entry: name of the table entry.
        seed: seed of the run.
        numerics: version of the arithmetic, `cnvzoo.training.NUMERICS`.
        epochs: number of epochs trained.
        trial: whether `epochs` is not the recipe's, or a held-out split was scored. Trials enter no table.
        holdout: number of training images held out and scored instead of the test set; 0 for a run of a table.
        accuracy: top-1 in percent, in float32, of the last epoch's weights: `correct` of `total` images.
        correct: number of images classified right.
        total: number of images scored.
        recipe: all keys of the recipe, with the seed of the run.
        recipe_sha256: `Recipe.fingerprint()`.
        data_sha256: `Dataset.sha256` of all images and labels, before any were held out.
        weights_sha256: sha256 of the safetensors file of the weights.
        seconds: training time, without evaluation.
        device: fields of `cnvzoo.training.numerics.Machine`.
        versions: versions of Python and of the libraries that decide the bits, by name.
        commit: commit of the checkout that trained, with a `+` appended if it had changes; None outside of a checkout.
        float_start: entry, seed and weights_sha256 of the float model of the recipe's float_start.
        teacher: entry, seed and weights_sha256 of the teacher, or a list of several.
        start: checkpoint that the recipe's `start` names, and sha256 of its weights file.
        finished: time of the end, UTC, ISO 8601.
        history: for each epoch: epoch, loss (training), lr, seconds; with `validate`, validation_accuracy in percent.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    entry: _Text
    seed: int = Field(ge=0, le=LARGEST_SEED)
    numerics: int = Field(ge=1)
    epochs: int = Field(ge=1)
    trial: bool
    holdout: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=100)
    correct: int = Field(ge=0)
    total: int = Field(gt=0)
    recipe: dict[str, Any]
    recipe_sha256: _Sha256
    data_sha256: _Sha256
    weights_sha256: _Sha256
    seconds: float = Field(ge=0)
    device: Annotated[dict[str, Any], _checked(Machine)]
    versions: dict[_Text, _Text]
    commit: str | None = Field(pattern=r"^[0-9a-f]{40}\+?$")
    float_start: _Input | None
    teacher: _Input | list[_Input] | None = None
    start: Annotated[dict[str, Any], _checked(StartRecord)] | None = None
    finished: Annotated[str, AfterValidator(_time)] = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")
    history: list[Annotated[dict[str, float], _checked(EpochRecord)]]

    @model_validator(mode="after")
    def _adds_up(self) -> RunRecord:
        if self.correct > self.total or abs(100 * self.correct / self.total - self.accuracy) > 0.005:
            raise ValueError(f"accuracy {self.accuracy} is not {self.correct} of {self.total}")
        recipe = self.parsed_recipe()
        if (fingerprint := recipe.fingerprint(self.data_sha256)) != self.recipe_sha256:
            raise ValueError(
                f"recipe_sha256 is {self.recipe_sha256[:8]}..., but that of the recipe in it is {fingerprint[:8]}...: "
                "the recipe or its fingerprint was edited"
            )
        for key, found, expected in (
            ("recipe.name", recipe.name, self.entry),
            ("recipe.seed", recipe.seed, self.seed),
            ("trial", self.trial, self.epochs != recipe.epochs or self.holdout > 0),
            ("float_start", self._entries_of("float_start"), [*recipe.needs.get("float_start", ())]),
            ("teacher", self._entries_of("teacher"), [*recipe.needs.get("teacher", ())]),
            ("history", len(self.history), self.epochs),
            ("validated", any("validation_accuracy" in epoch for epoch in self.history) and not self.holdout, False),
        ):
            if found != expected:
                raise ValueError(f"{key} is {found!r}, and by the rest of the record it has to be {expected!r}")
        started = self.start["checkpoint"] if self.start else None
        if started != recipe.start:
            raise ValueError(f"start is {started!r}, and by the recipe it has to be {recipe.start!r}")
        if is_dataset_path(recipe.dataset):
            return self
        total = self.holdout or dataset_info(recipe.dataset).test_size
        if self.data_sha256 == published_sha256(recipe.dataset) and self.total != total:
            raise ValueError(f"total is {self.total}, and {total} images of {recipe.dataset} are scored")
        return self

    def parsed_recipe(self) -> Recipe:
        """The recipe as a `Recipe`, with the seed of this run."""
        return Recipe.model_validate_json(json.dumps(self.recipe))

    def inputs(self) -> list[tuple[str, int, str]]:
        """Entry, seed and sha256 of the weights that the run started from, then of those that it learned from."""
        found = [*self._inputs("float_start"), *self._inputs("teacher")]
        return [(weights["entry"], weights["seed"], weights["weights_sha256"]) for weights in found]

    def _entries_of(self, purpose: Literal["float_start", "teacher"]) -> list[str]:
        return [weights["entry"] for weights in self._inputs(purpose)]

    def _inputs(self, purpose: Literal["float_start", "teacher"]) -> list[dict[str, Any]]:
        found = self.float_start if purpose == "float_start" else self.teacher
        return found if isinstance(found, list) else [] if found is None else [found]

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a record.

        Raises:
            RecordError: the file cannot be read, a field is missing or out of range, or fields contradict each other.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(_LARGEST_RECORD + 1)
        except OSError as error:
            raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
        if len(content) > _LARGEST_RECORD:
            raise RecordError(f"{path}: not a valid run record: more than {_LARGEST_RECORD:,} bytes")
        try:
            return cls.model_validate_json(content.decode())
        except ValidationError as error:
            raise RecordError(f"{path}: not a valid run record: {explain(error)}") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise RecordError(f"{path}: not a valid run record: {error}") from None

    def write(self, path: str | Path) -> None:
        """Write the record as JSON; an existing file is replaced in one step."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
