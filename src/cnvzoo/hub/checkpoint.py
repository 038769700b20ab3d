"""A checkpoint: a folder `<model tag>.<dataset>/` with `model.safetensors` and `config.json`.

The config says everything that is needed to build the model, feed it, and check the number that it is published with.
No file is looked into before its size and sha256 were found to be those that it was published with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import nn

from cnvzoo.data import Preprocessing
from cnvzoo.errors import explain
from cnvzoo.files import replacing, write_text

from .build import build_empty, build_skeleton
from .errors import CheckpointError
from .facts import LARGEST_FILE, FileFacts, read_limited, read_verified
from .index import CONFIG, WEIGHTS, Name
from .tensors import fill, is_quantized, packed_file, read_plain, read_published
from .values import (
    Classes,
    Commit,
    Count,
    DeviceFacts,
    ModelArguments,
    Ordinal,
    PreprocessingValues,
    RecipeValues,
    Sha256,
    Total,
    Versions,
    Word,
)

FORMAT_VERSION = 1
_LARGEST_CONFIG = 1 << 18  # bytes
_NEWER = ("recipes_scored", "numerics")  # not written where they are not known: older configs keep their sha256


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_serializer(mode="wrap")
    def _without_newer_keys_that_are_not_known(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None or key not in _NEWER}


class SeedResult(_Section):
    """What one seed of the recipe came to.

    Attributes:
        seed: of the run.
        correct, total: test images classified right, of how many.
        weights_sha256: of the weights file of the run.
        numerics: version of the training arithmetic of the run; None where its record has none.
    """

    seed: Count
    correct: Count
    total: Total
    weights_sha256: Sha256
    numerics: Ordinal | None = None


class CheckpointFacts(_Section):
    """What is known of a checkpoint before its weights are laid out; `values` has the bounds.

    Attributes:
        name: `<model tag>.<dataset>`, the folder's name.
        model: the arguments of `cnvzoo.create_model`, its name included.
        dataset: what the model was trained on.
        classes: names of the outputs, in order.
        preprocessing: `Preprocessing.to_dict()`.
        seed: of the run whose weights these are.
        correct, total: test images that they classify right, of how many; accuracy is their ratio.
        results: of every seed of the recipe that has been run, this one included.
        weights_sha256: of the weights file of the run.
        recipe: the whole recipe.
        versions, device, commit: of the run.
        recipes_scored: how many recipes of this entry were ever scored on the test set, this one included; None where
            that is not known.
        numerics: version of the training arithmetic of the run; None where its record has none.
    """

    name: Name
    model: ModelArguments
    dataset: Word
    classes: Classes
    preprocessing: PreprocessingValues
    seed: Count
    correct: Count
    total: Total
    results: list[SeedResult] = Field(max_length=1000)
    weights_sha256: Sha256
    recipe: RecipeValues
    versions: Versions
    device: DeviceFacts
    commit: Commit | None
    recipes_scored: Ordinal | None = None
    numerics: Ordinal | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> CheckpointFacts:
        own = SeedResult(
            seed=self.seed, correct=self.correct, total=self.total, weights_sha256=self.weights_sha256,
            numerics=self.numerics,
        )  # fmt: skip
        if self.results.count(own) != 1:
            raise ValueError(f"results: must have seed {self.seed} once, with the numbers of this checkpoint")
        if any(result.correct > result.total for result in self.results):
            raise ValueError("results: more images right than there are")
        for key, count in (("num_classes", len(self.classes)), ("in_chans", len(self.preprocessing["mean"]))):
            if self.model.get(key) != count:
                raise ValueError(f"model.{key}: {self.model.get(key)!r}, where classes and preprocessing have {count}")
        return self

    @property
    def accuracy(self) -> float:
        """Top-1 on the test set, in percent."""
        return 100 * self.correct / self.total


class IntegerResult(_Section):
    """What the integer graph of a quantized checkpoint came to on the whole test set, in ONNX Runtime.

    Its outputs were those of the slow reference bit for bit, or there would be no result.

    Attributes:
        correct: test images that it classifies right; the same on every machine.
        agreeing: test images to which it gives the class that the checkpoint's model gives in PyTorch.
        differing, reachable: of the accumulators that inputs can reach, summed over all channels, how many give another
            level than exact arithmetic, and how many there are.
        bytes: of the ONNX file.
    """

    correct: Count
    agreeing: Count
    differing: Count
    reachable: Total
    bytes: Total


class CheckpointConfig(CheckpointFacts):
    """config.json: the facts, what model.safetensors has to be, and the version of the format of the two.

    `integer` is what its integer graph came to, where that was measured.
    """

    format_version: int
    file: FileFacts
    integer: IntegerResult | None = None

    @field_validator("format_version")
    @classmethod
    def _is_ours(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError(f"{version}, and this cnvzoo reads {FORMAT_VERSION}: install a version that fits")
        return version


def write_checkpoint(folder: str | Path, facts: CheckpointFacts, weights: str | Path) -> CheckpointConfig:
    """Lay out a checkpoint from the weights file of a run, weights first; returns its config.

    Raises:
        CheckpointError: the file is not the one that the facts describe, or does not hold exactly the model's tensors.
    """
    weights, folder = Path(weights), Path(folder)
    content = read_limited(weights, LARGEST_FILE, f"more than {LARGEST_FILE:,} bytes: no small image classifier")
    if (found := FileFacts.of(content).sha256) != facts.weights_sha256:
        raise CheckpointError(f"{weights}: sha256 is {found[:16]}..., {facts.name} has {facts.weights_sha256[:16]}...")
    try:
        model = build_empty(facts.model)
        model.load_state_dict(read_plain(content, model), strict=True)
        if is_quantized(model):
            content = packed_file(model.eval())
    except CheckpointError as error:
        raise CheckpointError(f"{weights}: not the weights of {facts.name}: {error}") from None
    config = CheckpointConfig(**dict(facts), format_version=FORMAT_VERSION, file=FileFacts.of(content))
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(content)
    write_config(folder, config)
    return config


def write_config(folder: str | Path, config: CheckpointConfig) -> None:
    """Write the config of a checkpoint whose weights are there."""
    write_text(Path(folder) / CONFIG, json.dumps(config.model_dump(mode="json"), indent=1) + "\n")


def read_config(folder: str | Path, facts: FileFacts | None = None) -> CheckpointConfig:
    """Read and validate the config of a checkpoint, which has to be the file that `facts` describe.

    Raises:
        CheckpointError: the file is missing, another, or not valid.
    """
    path = Path(folder) / CONFIG
    if facts is None:
        content = read_limited(path, _LARGEST_CONFIG, f"more than {_LARGEST_CONFIG:,} bytes: no checkpoint config")
    else:
        content = read_verified(path, facts)
    try:
        return CheckpointConfig.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a valid checkpoint config: {explain(error)}") from None


def check_weights(folder: str | Path, config: CheckpointConfig) -> None:
    """Raise CheckpointError where model.safetensors is not the file that its config describes."""
    read_verified(Path(folder) / WEIGHTS, config.file)


def read_model(folder: str | Path, files: Mapping[str, FileFacts] | None = None) -> tuple[nn.Module, CheckpointConfig]:
    """Build the model of a checkpoint, in eval mode on the CPU, with its weights.

    Args:
        folder: of the checkpoint.
        files: what config.json and model.safetensors have to be; by default config.json is taken as it is, and says
            what model.safetensors has to be.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not exactly the model's.
    """
    folder = Path(folder)
    config = read_config(folder, files[CONFIG] if files else None)
    content = read_verified(folder / WEIGHTS, config.file)
    try:
        skeleton = build_skeleton(config.model)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    try:
        state = read_published(content, skeleton)
        model = build_empty(config.model)
        fill(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: not the weights of {config.name}: {error}") from None
    return model.eval(), config


def preprocessing_from(config: CheckpointConfig) -> Preprocessing:
    """The way images reach the checkpoint's model."""
    return Preprocessing.from_dict(config.preprocessing)
