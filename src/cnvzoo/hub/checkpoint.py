"""A checkpoint: a folder `<model tag>.<dataset>/` with `model.safetensors` and `config.json`.

The config says everything that is needed to build the model, feed it, and check the number that it is
published with. Weights are read only after their sha256 was found to be the config's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cnvzoo.data import Preprocessing
from cnvzoo.errors import CnvzooError, ModelError
from cnvzoo.files import replacing, sha256_of, write_text
from cnvzoo.models import build_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(CnvzooError):
    """A checkpoint that is missing, damaged or does not fit: names the file and what was expected."""


class CheckpointConfig(BaseModel):
    """config.json.

    Attributes:
        name: `<model tag>.<dataset>`, the folder's name.
        model: the arguments of `cnvzoo.create_model`, its name included.
        dataset: what the model was trained on.
        classes: names of the outputs, in order.
        preprocessing: `Preprocessing.to_dict()`.
        correct, total: test images classified right, of how many; accuracy is their ratio.
        weights_sha256: of model.safetensors.
        recipe: the whole recipe; `seed` included.
        versions, device, commit: of the run.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    model: dict[str, Any]
    dataset: str
    classes: list[str]
    preprocessing: dict[str, Any]
    correct: int = Field(ge=0)
    total: int = Field(gt=0)
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: dict[str, Any]
    commit: str | None

    @property
    def accuracy(self) -> float:
        """Top-1 on the test set, in percent."""
        return 100 * self.correct / self.total


def write_checkpoint(folder: str | Path, config: CheckpointConfig, weights: str | Path) -> None:
    """Lay out a checkpoint from a config and a safetensors file, weights first.

    Raises:
        CheckpointError: the file is not the one that the config describes.
    """
    folder = Path(folder)
    with replacing(folder / WEIGHTS) as temporary:
        shutil.copyfile(weights, temporary)
        _check_weights(temporary, config, str(weights))
    write_text(folder / CONFIG, json.dumps(config.model_dump(mode="json"), indent=1) + "\n")


def read_config(folder: str | Path) -> CheckpointConfig:
    """Read and validate the config of a checkpoint. Raises CheckpointError."""
    path = Path(folder) / CONFIG
    try:
        return CheckpointConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): is {folder} a checkpoint folder?") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a valid checkpoint config: {error}") from None


def load_checkpoint(folder: str | Path) -> tuple[nn.Module, CheckpointConfig]:
    """Build the model of a checkpoint, in eval mode on the CPU, with its weights.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not exactly the model's.
    """
    config = read_config(folder)
    path = Path(folder) / WEIGHTS
    _check_weights(path, config, str(path))
    try:
        model = build_model(**config.model)
    except (TypeError, ModelError) as error:
        raise CheckpointError(f"{Path(folder) / CONFIG}: its model cannot be built: {error}") from None
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the tensors are not those of {config.name}: {error}") from None
    return model.eval(), config


def preprocessing_from(config: CheckpointConfig) -> Preprocessing:
    """The way images reach the checkpoint's model."""
    return Preprocessing.from_dict(config.preprocessing)


def _check_weights(path: Path, config: CheckpointConfig, shown: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be read: {error.strerror}") from None
    if found != config.weights_sha256:
        raise CheckpointError(
            f"{shown}: sha256 is {found[:16]}..., {config.name} has {config.weights_sha256[:16]}...: "
            "the file is damaged or another: fetch or train it again"
        )
