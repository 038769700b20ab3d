"""The run record: what one run was, and what came of it. Tables are made of these and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cnvzoo.errors import CnvzooError
from cnvzoo.files import write_text


class RecordError(CnvzooError, ValueError):
    """A file that is not a valid run record: names the file and what is wrong in it."""


class RunRecord(BaseModel):
    """One finished run.

    Attributes:
        entry, seed: which run of which table entry.
        trial: the run used fewer epochs than its recipe or a held-out split, and enters no table.
        holdout: training images held out and scored on instead of the test set; 0 for a real run.
        accuracy: top-1 in percent of the last epoch's weights, `correct` of `total` images in float32.
        weights: `final`, or `ema` where the recipe averages.
        recipe, recipe_sha256: the whole recipe, and `Recipe.fingerprint()`.
        weights_sha256: of the safetensors file of all weights.
        seconds: training time, evaluation excluded.
        device: kind, name; on a CPU threads and instruction set; for quantized models, whether fake quantization
            ran compiled.
        versions: of the libraries that decide the bits.
        commit: of the checkout that trained, if it is one; `+` at its end if it had changes.
        float_start: entry, seed and weights_sha256 of the float model that a quantized run started from.
        teacher: entry, seed and weights_sha256 of the float model that taught this one, or a list of several.
        finished: UTC, ISO 8601.
        history: per epoch: epoch, loss (training), lr, seconds.
    """

    model_config = ConfigDict(extra="forbid")

    entry: str
    seed: int
    trial: bool
    holdout: int
    accuracy: float = Field(ge=0, le=100)
    correct: int = Field(ge=0)
    total: int = Field(gt=0)
    weights: Literal["final", "ema"]
    recipe: dict[str, Any]
    recipe_sha256: str
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    seconds: float
    device: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    float_start: dict[str, Any] | None
    teacher: dict[str, Any] | list[dict[str, Any]] | None = None
    finished: str
    history: list[dict[str, float]]

    @model_validator(mode="after")
    def _adds_up(self) -> RunRecord:
        if self.correct > self.total or abs(100 * self.correct / self.total - self.accuracy) > 0.005:
            raise ValueError(f"accuracy {self.accuracy} is not {self.correct} of {self.total}")
        return self

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a record. Raises RecordError if the file is unreadable or not a valid record."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValidationError, UnicodeDecodeError) as error:
            raise RecordError(f"{path}: not a valid run record: {error}") from None

    def write(self, path: str | Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
