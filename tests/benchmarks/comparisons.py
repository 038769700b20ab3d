"""Comparisons of recipes on held-out training images: `comparisons.yaml`, validated."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any

from harness.entries import FileSection, HarnessError, read_harness_file
from pydantic import Field, ValidationError, model_validator

from cnvzoo.errors import nearest
from cnvzoo.strict_yaml import Where, error_at, explain_with_lines, place_of

_Percent = Annotated[float, Field(strict=True, ge=0, le=100)]
_Seconds = Annotated[float, Field(strict=True, gt=0)]
_Range = Annotated[list[_Seconds], Field(min_length=2, max_length=2)]
_Text = Annotated[str, Field(min_length=1)]
_ROUNDING = 1e-6  # images that floating point may make of a whole number


class Variant(FileSection):
    """One of the recipes compared; the keys are described in comparisons.yaml.

    Attributes:
        name: what `chosen` refers to.
        change: what distinguishes it, as text or as keys of a recipe.
        correct: held-out images classified correctly; either this or `accuracy` is given.
        accuracy: the same in percent.
        seconds_per_epoch: one figure, or the least and the most.
    """

    name: _Text
    change: _Text | dict[str, Any]
    correct: int | None = Field(default=None, ge=0)
    accuracy: _Percent | None = None
    seconds_per_epoch: _Seconds | _Range | None = None

    @model_validator(mode="after")
    def _has_one_figure(self) -> Variant:
        if (self.correct is None) == (self.accuracy is None):
            raise ValueError("give either correct or accuracy")
        if isinstance(self.seconds_per_epoch, list) and self.seconds_per_epoch != sorted(self.seconds_per_epoch):
            raise ValueError("seconds_per_epoch: give the least first, then the most")
        return self


class Comparison(FileSection):
    """Variants of a recipe, each trained once and scored on the same held-out training images."""

    entries: list[_Text] = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    command: _Text
    machine: _Text
    versions: _Text
    holdout: int = Field(gt=0)
    seed: int | None = Field(ge=0)
    epochs: int = Field(ge=1)
    variants: list[Variant] = Field(min_length=2)
    chosen: str | None

    @model_validator(mode="after")
    def _is_possible(self) -> Comparison:
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise error_at("date", f"{self.date!r}: {error}") from None
        names = [variant.name for variant in self.variants]
        for number, variant in enumerate(self.variants):
            place = f"variants.{number}"
            if variant.name in names[:number]:
                raise error_at(f"{place}.name", f"{variant.name!r}: the name of another variant too: rename one")
            if variant.correct is not None and variant.correct > self.holdout:
                raise error_at(f"{place}.correct", f"{variant.correct}: more than the {self.holdout} images held out")
            if variant.accuracy is not None and not _is_whole(variant.accuracy * self.holdout / 100):
                images = variant.accuracy * self.holdout / 100
                raise error_at(
                    f"{place}.accuracy",
                    f"{variant.accuracy}: {images:.2f} of {self.holdout} images, not a whole number: correct one",
                )
        if self.chosen is not None and self.chosen not in names:
            raise error_at("chosen", f"{self.chosen!r}: no variant: {nearest(self.chosen, names)}")
        return self


def load_comparisons(path: Path, configs: Path) -> list[Comparison]:
    """The comparisons in the file at `path`, whose entries are recipes or base recipes in `configs`.

    Raises HarnessError, with file and line, if the file cannot be read, a value is not valid, an accuracy is not a
    whole number of images, or a name is no recipe.
    """
    found = read_harness_file(path)
    if not isinstance(found.values, list):
        raise HarnessError(f"{path}:1: comparisons are a list, not {type(found.values).__name__}")
    comparisons = [_comparison(number, values, found.where, path) for number, values in enumerate(found.values)]
    recipes = [file.stem for file in sorted(configs.glob("*.yaml"))]
    for number, comparison in enumerate(comparisons):
        for position, name in enumerate(comparison.entries):
            if name not in recipes:
                place = place_of(found.where, (str(number), "entries", str(position)), str(path))
                raise HarnessError(f"{place}: entries: no recipe is named {name!r}: {nearest(name, recipes)}")
    return comparisons


def _comparison(number: int, values: Any, where: Where, path: Path) -> Comparison:
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        prefix = str(number)
        own = {key[1:]: place for key, place in where.items() if key[:1] == (prefix,)}
        raise HarnessError(explain_with_lines(error, Comparison, own, where.get((prefix,), str(path)))) from None


def _is_whole(images: float) -> bool:
    return abs(images - round(images)) < _ROUNDING
