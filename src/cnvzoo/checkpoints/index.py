"""The index: every published checkpoint with size and sha256 of its files. It ships inside the package.

So a checkpoint is the same wherever it is fetched from. `benchmarks/reproduce.py` renders `index.json` from the
published folders. This module does not import PyTorch: listing checkpoints is fast.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

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
from cnvzoo.errors import DatasetError, ModelError, explain, nearest

INDEX = Path(__file__).with_name("index.json")


class PublishedCheckpoint(BaseModel):
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
    def _has_files_for_loading(self) -> PublishedCheckpoint:
        if missing := {CONFIG, WEIGHTS} - self.files.keys():
            raise ValueError(f"files: {' and '.join(sorted(missing))} missing")
        return self


class Index(BaseModel):
    """index.json: the published checkpoints by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    checkpoints: dict[Name, PublishedCheckpoint]


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


def row(name: str, published: PublishedCheckpoint) -> CheckpointInfo:
    """The row of `list_checkpoints` for one checkpoint."""
    return {
        "name": name,
        "model": published.model["name"],
        "dataset": published.dataset,
        "w_bits": published.model.get("w_bits"),
        "a_bits": published.model.get("a_bits"),
        "accuracy": 100 * published.correct / published.total,
        "correct": published.correct,
        "total": published.total,
        "parameters": published.parameters,
        "macs": published.macs,
        "bytes": published.files[WEIGHTS].size,
    }


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a name matches a shell pattern, or one of several."""
    return any(fnmatch.fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def list_checkpoints(
    pattern: str | Sequence[str] = "*",
    *,
    exclude: str | Sequence[str] = (),
    dataset: str | None = None,
    w_bits: int | Literal["float"] | None = None,
    a_bits: int | Literal["float"] | None = None,
    min_accuracy: float | None = None,
    max_bytes: int | None = None,
) -> list[CheckpointInfo]:
    """The published checkpoints that fit all of the conditions, sorted by name.

    Args:
        pattern: shell pattern of names, such as `*.cifar10`, or several, one of which has to match.
        exclude: patterns of names to leave out.
        dataset: name of the dataset that they were trained on.
        w_bits, a_bits: bit widths of weights and activations, 1 to 8; `float` for float models.
        min_accuracy: smallest accuracy on the test set, in percent.
        max_bytes: largest size of the weights file.

    Returns:
        Dicts of name, model, dataset, w_bits and a_bits (None for float), accuracy in percent, correct and total test
        images, parameters, macs for one image, and bytes of the weights file.

    Raises:
        DatasetError: no published checkpoint was trained on `dataset`.
        ModelError: a bit width that no model has.
    """
    rows = [row(name, published) for name, published in sorted(read_index().checkpoints.items())]
    datasets = sorted({found["dataset"] for found in rows})
    if dataset is not None and dataset not in datasets:
        raise DatasetError(f"no published checkpoint was trained on {dataset!r}: {nearest(dataset, datasets)}")
    return [
        found
        for found in rows
        if matches(found["name"], pattern)
        and not matches(found["name"], exclude)
        and dataset in (None, found["dataset"])
        and _has_bits("w_bits", w_bits, found["w_bits"])
        and _has_bits("a_bits", a_bits, found["a_bits"])
        and (min_accuracy is None or found["accuracy"] >= min_accuracy)
        and (max_bytes is None or found["bytes"] <= max_bytes)
    ]


def _has_bits(argument: str, wanted: int | str | None, bits: int | None) -> bool:
    if wanted is None or wanted == "float":
        return wanted is None or bits is None
    if isinstance(wanted, bool) or wanted not in range(1, 9):
        raise ModelError(f"{argument}={wanted!r}: a whole number from 1 to 8, or 'float'")
    return wanted == bits
