"""The index: every published checkpoint, with size and sha256 of its files. It ships inside the package.

So what a checkpoint is does not depend on where it is fetched from. `index.json` is rendered from the published
folders by `benchmarks/reproduce.py`; nobody writes it by hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from cnvzoo.errors import explain

from .errors import CheckpointError
from .facts import FileFacts
from .values import Count, ModelArguments, Total, Word

INDEX = Path(__file__).with_name("index.json")
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


def checked_name(name: str) -> str:
    """`name`, if it can only be that of something inside a folder; else ValueError.

    Letters, digits, `_`, `-` and `.`, the first neither `-` nor `.`: no separators, no `..`, nothing hidden.
    """
    if not isinstance(name, str) or not _SAFE.fullmatch(name) or name.endswith("."):
        raise ValueError(f"{name!r} is not the name of a checkpoint or of a file in one: letters, digits, _, - and .")
    return name


Name = Annotated[str, AfterValidator(checked_name)]


class IndexEntry(BaseModel):
    """One published checkpoint.

    Attributes:
        model: the arguments of `cnvzoo.create_model`, its name included.
        dataset: what it was trained on.
        correct, total: test images classified right, of how many.
        parameters, macs: as `cnvzoo.model_info` counts them.
        files: every file of the folder, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: ModelArguments
    dataset: Word
    correct: Count
    total: Total
    parameters: Count
    macs: Count
    files: dict[Name, FileFacts]

    @model_validator(mode="after")
    def _has_what_loading_needs(self) -> IndexEntry:
        if missing := {CONFIG, WEIGHTS} - self.files.keys():
            raise ValueError(f"files: {' and '.join(sorted(missing))} missing")
        return self


class Index(BaseModel):
    """index.json: the published checkpoints by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    checkpoints: dict[Name, IndexEntry]


class CheckpointInfo(TypedDict):
    """A row of `list_checkpoints`: accuracy in percent, bits None for float, bytes of model.safetensors."""

    name: str
    model: str
    dataset: str
    w_bits: int | None
    a_bits: int | None
    accuracy: float
    correct: int
    total: int
    parameters: int
    macs: int
    bytes: int


def read_index(path: Path | None = None) -> Index:
    """The index of this package, or the one at `path`. Raises CheckpointError where it is damaged."""
    path = path or INDEX
    try:
        return Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): install cnvzoo again") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a valid index: {explain(error)}: install cnvzoo again") from None


def row(name: str, entry: IndexEntry) -> CheckpointInfo:
    """What people choose a checkpoint by."""
    return {
        "name": name,
        "model": entry.model["name"],
        "dataset": entry.dataset,
        "w_bits": entry.model.get("w_bits"),
        "a_bits": entry.model.get("a_bits"),
        "accuracy": 100 * entry.correct / entry.total,
        "correct": entry.correct,
        "total": entry.total,
        "parameters": entry.parameters,
        "macs": entry.macs,
        "bytes": entry.files[WEIGHTS].size,
    }
