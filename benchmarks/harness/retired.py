"""What is kept of records that others have replaced, so that a table can say how often its test set was read.

A recipe that is changed after its score on the test set was seen has been chosen on the test set in part. The record
of the run before goes when the new one takes its place; its score, its recipe's fingerprint and its weights' sha256
stay in `benchmarks/retired.json`, one JSON object a line.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cnvzoo.files import write_text
from cnvzoo.train import RecordError, RunRecord

from .entries import SEEDS, Entry
from .errors import HarnessError
from .files import shown
from .layout import Layout


class RetiredRecord(BaseModel):
    """The part of a run record that says what was scored on the test set, and what came of it.

    Attributes:
        entry, seed: which run of which table entry.
        recipe_sha256: `Recipe.fingerprint()` of the recipe as it was then.
        numerics: the version of the arithmetic; None for those from before it was kept.
        epochs: of that recipe.
        accuracy: top-1 in percent on the test set, `correct` of `total` images.
        weights_sha256: of the safetensors file of all weights.
        commit: of the checkout that trained, as in the record: None if it was none, `+` at its end if it had changes.
        finished: UTC, ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    entry: str
    seed: int
    recipe_sha256: str
    numerics: int | None = None
    epochs: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=100)
    correct: int = Field(ge=0)
    total: int = Field(gt=0)
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    commit: str | None
    finished: str

    @model_validator(mode="after")
    def _adds_up(self) -> RetiredRecord:
        if self.correct > self.total or abs(100 * self.correct / self.total - self.accuracy) > 0.005:
            raise ValueError(f"accuracy {self.accuracy} is not {self.correct} of {self.total}")
        return self

    @classmethod
    def of(cls, record: RunRecord) -> RetiredRecord:
        """What is kept of `record`."""
        return cls.model_validate(record.model_dump(include=set(cls.model_fields)))


_FILE = TypeAdapter(list[RetiredRecord])


def load_retired(path: Path) -> list[RetiredRecord]:
    """The retired records in the file at `path`, in its order; none if there is no file.

    Raises HarnessError if the file cannot be read or is not a list of retired records.
    """
    if not path.exists():
        return []
    try:
        return _FILE.validate_json(path.read_bytes())
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        problem = f"not a list of retired records: {place}{first['msg']}"
    raise HarnessError(f"{shown(path)}: {problem}; restore it from version control")


def retire(path: Path, record: RunRecord) -> bool:
    """Add to the file at `path` what is kept of `record`, whole or not at all; returns whether it was not there yet.

    A trial is not added: no table ever had it. Raises HarnessError if the file is not a list of retired records.
    """
    retired, new = load_retired(path), RetiredRecord.of(record)
    if record.trial or any(_identity(old) == _identity(new) for old in retired):
        return False
    lines = [line.model_dump_json() for line in sorted([*retired, new], key=_order)]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    return True


def recipes_scored(entries: Iterable[Entry], layout: Layout) -> dict[str, int]:
    """How many recipes of each entry, told apart by their fingerprints, were ever scored on the test set.

    Those of the retired records count, and those of the records among the results, out of date or not; trials do not.
    """
    fingerprints: dict[str, set[str]] = {entry.name: set() for entry in entries}
    for old in load_retired(layout.retired):
        if old.entry in fingerprints:
            fingerprints[old.entry].add(old.recipe_sha256)
    for name, found in fingerprints.items():
        for seed in SEEDS:
            try:
                record = RunRecord.read(layout.record(name, seed))
            except RecordError:  # not there, or named with its problem by harness.records
                continue
            if not record.trial and record.entry == name:
                found.add(record.recipe_sha256)
    return {name: len(found) for name, found in fingerprints.items()}


def _identity(record: RetiredRecord) -> tuple[str, int, str, str]:
    return record.entry, record.seed, record.recipe_sha256, record.weights_sha256


def _order(record: RetiredRecord) -> tuple[str, int, str, str]:
    return record.entry, record.seed, record.finished, record.weights_sha256
