"""The figures that ours are compared with: `references.yaml`, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from cnvzoo.errors import nearest
from cnvzoo.strict_yaml import Where, error_at, explain_with_lines, place_of
from harness.entries import Entry, FileSection, HarnessError, read_harness_file

_TOLERANCE = 0.0101  # points between a published figure of two decimals, rounded or truncated, and that of the runs
_Accuracy = Annotated[float, Field(strict=True, gt=0, le=100)]  # in percent


class Source(FileSection):
    """Who measured figures, where they are published, and the hardware and versions; see references.yaml."""

    project: str = Field(min_length=1)
    url: str = Field(pattern=r"^https?://\S+$")
    document: str = Field(min_length=1)
    version: str = Field(min_length=1)
    seeds: list[int]
    setting: str = Field(min_length=1)

    @property
    def citation(self) -> str:
        """In Markdown, one sentence without its full stop."""
        seeds = f"seeds {', '.join(map(str, self.seeds))}" if self.seeds else "seeds not stated"
        return f"[{self.project}]({self.url}), the tables of {self.document} ({self.version}); {seeds}; {self.setting}"


class _Figures(FileSection):
    source: str
    runs: list[_Accuracy] | None = Field(default=None, min_length=1)
    mean: _Accuracy | None = None
    std: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _agrees(self) -> _Figures:
        """The file has both the runs and their published mean, so that a typing error in one is noticed."""
        if self.runs is None and self.mean is None:
            raise ValueError("give runs, or the mean if only that was published")
        if self.runs is not None:
            self._compare("mean", self.mean, fmean(self.runs))
            self._compare("std", self.std, stdev(self.runs) if len(self.runs) > 1 else None)
        return self

    def _compare(self, key: str, published: float | None, computed: float | None) -> None:
        if published is not None and (computed is None or abs(published - computed) > _TOLERANCE):
            found = "one has none" if computed is None else f"theirs is {computed:.4f}"
            message = f"{published}: not that of the runs, {found}: correct one or the other"
            raise error_at(key, message)


class _File(FileSection):
    sources: dict[str, Source] = Field(default_factory=dict)
    entries: dict[str, _Figures] = Field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """What an entry is compared with.

    Attributes:
        source: where the figures come from.
        mean: test accuracy in percent, as published, or of the runs.
        runs: the single runs in the order of their seeds; empty if only the mean was published.
    """

    source: Source
    mean: float
    runs: tuple[float, ...] = ()


def load_references(path: Path, entries: Mapping[str, Entry]) -> dict[str, Reference]:
    """The reference of each entry that has one.

    Raises HarnessError, with file and line, if the file cannot be read, a figure is not valid or does not agree with
    the runs, or a name is no entry or no source.
    """
    found = read_harness_file(path)
    values = {} if found.values is None else found.values
    if not isinstance(values, dict):
        raise HarnessError(f"{path}:1: references are a mapping of sources and entries, not {type(values).__name__}")
    try:
        file = _File.model_validate(values)
    except ValidationError as error:
        raise HarnessError(explain_with_lines(error, _File, found.where, str(path))) from None
    return {
        name: _reference(name, figures, file.sources, entries, found.where, str(path))
        for name, figures in file.entries.items()
    }


def _reference(
    name: str,
    figures: _Figures,
    sources: Mapping[str, Source],
    entries: Mapping[str, Entry],
    where: Where,
    file: str,
) -> Reference:
    if name not in entries:
        raise HarnessError(
            f"{place_of(where, ('entries', name), file)}: no recipe is named {name!r}: {nearest(name, entries)}"
        )
    if figures.source not in sources:
        key = ("entries", name, "source")
        remedy = nearest(figures.source, sources) if sources else "describe it under sources"
        raise HarnessError(f"{place_of(where, key, file)}: {'.'.join(key)}: {figures.source!r} is no source: {remedy}")
    runs = tuple(figures.runs or ())
    mean = fmean(runs) if figures.mean is None else figures.mean
    return Reference(source=sources[figures.source], mean=mean, runs=runs)
