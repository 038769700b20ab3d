"""The index: every published checkpoint with size and sha256 of its files. It ships inside the package.

So a checkpoint is the same wherever it is fetched from. `benchmarks/reproduce.py` renders `index.json` from the
published folders. This module does not import PyTorch: listing checkpoints is fast.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cnvzoo.checkpoints.format import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    Count,
    FileFacts,
    ModelArguments,
    Name,
    Total,
    Word,
)
from cnvzoo.errors import explain

INDEX = Path(__file__).with_name("index.json")


class IndexEntry(BaseModel):
    """One published checkpoint.

    Attributes:
        model: arguments of `cnvzoo.create_model`, the name included.
        dataset: dataset that it was trained on.
        correct, total: correctly classified test images, and all test images.
        parameters, macs: number of parameters, and multiply-accumulates per image.
        files: size and sha256 of every file of the folder, by name.
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
    def _has_files_for_loading(self) -> IndexEntry:
        if missing := {CONFIG, WEIGHTS} - self.files.keys():
            raise ValueError(f"files: {' and '.join(sorted(missing))} missing")
        return self


class Index(BaseModel):
    """index.json: the published checkpoints by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    checkpoints: dict[Name, IndexEntry]


class CheckpointInfo(TypedDict):
    """A row of `list_checkpoints`: accuracy in percent; bits are None for float; bytes of the weights file."""

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
    """The index inside this package, or the one at `path`. Raises CheckpointError where it is damaged."""
    path = path or INDEX
    try:
        return Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): install cnvzoo again") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a valid index: {explain(error)}: install cnvzoo again") from None


def row(name: str, entry: IndexEntry) -> CheckpointInfo:
    """The row of `list_checkpoints` for one checkpoint."""
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


def list_checkpoints(pattern: str = "*") -> list[CheckpointInfo]:
    """The published checkpoints whose names match a shell pattern such as `*.cifar10`, sorted by name.

    Returns:
        Dicts of name, model, dataset, w_bits and a_bits (None for float), accuracy in percent, correct and total test
        images, parameters, macs for one image, and bytes of the weights file.
    """
    entries = sorted(read_index().checkpoints.items())
    return [row(name, entry) for name, entry in entries if fnmatch.fnmatchcase(name, pattern)]
