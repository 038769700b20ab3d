"""config.json: the types of a checkpoint's config, with bounds for every value.

A config may come from anyone. A model is built and memory is allocated from it, and its card has a command that people
copy into a shell. So every text is printable, names are single words for a shell, and numbers and sizes are limited; an
error names the key. Names of checkpoints and files have no separators, so that they cannot lead out of a folder.

This module does not import PyTorch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from cnvzoo.errors import CnvzooError, ModelError, explain
from cnvzoo_runtime.metadata import is_printable


class CheckpointError(CnvzooError):
    """A checkpoint is missing, damaged or does not fit. The message names the file and what was expected."""


class StoreError(CheckpointError):
    """A store does not return or accept a checkpoint. The message says what failed and what to do."""


CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


def checked_name(name: str) -> str:
    """Return `name` if it is a plain name inside a folder, else raise ValueError.

    Letters, digits, `_`, `-` and `.`; neither `-` nor `.` comes first, and `.` is not last.
    """
    if not isinstance(name, str) or not _SAFE.fullmatch(name) or name.endswith("."):
        raise ValueError(
            f"{name!r} is not the name of a checkpoint or of one of its files: use letters, digits, _, - and ."
        )
    return name


def checked_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """The names of classes that a caller gave. Raises ModelError for one text, a set, or what has no items."""
    if isinstance(classes, (str, bytes, set, frozenset)) or not isinstance(classes, Iterable):
        kind = "one text" if isinstance(classes, (str, bytes)) else type(classes).__name__
        raise ModelError(f"classes={classes!r}: give a list of names, not {kind}")
    return tuple(classes)


Name = Annotated[str, AfterValidator(checked_name)]
LARGEST_FILE = 1 << 30  # bytes; limits the memory for a file whose size a config claims


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class FileFacts:
    """Expected sha256 of a file in hexadecimal, and its size in bytes (up to 1 GiB)."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0, le=LARGEST_FILE)

    @classmethod
    def of(cls, content: bytes) -> FileFacts:
        return cls(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


LARGEST_SIDE = 1024  # pixels
_SMALL_SIDE = 64  # pixels; an input of this size takes little memory, however small the images are
_LARGEST_SEED = 2**63 - 1  # as of a recipe
_LONGEST_TEXT = 200  # characters
_LARGEST_WHOLE = 2**53  # every JSON reader represents integers up to this exactly
_DEEPEST = 6  # levels of nested values
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)


def _printable(text: str) -> str:
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(text):,} characters, where {_LONGEST_TEXT} are allowed")
    if not is_printable(text):
        raise ValueError(f"{text!r} has a character that cannot be printed, such as a line break")
    return text


def _word(text: str) -> str:
    if not _SAFE.fullmatch(text):
        raise ValueError(f"{text[:_LONGEST_TEXT]!r} is not a name: up to 128 letters, digits, _, - and .")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
Word = Annotated[str, AfterValidator(_word)]  # one word in a shell, and not an option
Count = Annotated[int, Field(ge=0, le=_LARGEST_WHOLE)]
Seed = Annotated[int, Field(ge=0, le=_LARGEST_SEED)]
Total = Annotated[int, Field(gt=0, le=_LARGEST_WHOLE)]
Ordinal = Annotated[int, Field(ge=1, le=_LARGEST_WHOLE)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}\+?$")]  # ends with + where the checkout had changes
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+!_-]{0,63}$")]
Classes = Annotated[list[Text], Field(min_length=1, max_length=10_000)]


# (w_bits, a_bits) by the name of a layer, or a shell pattern of names
_Width = Annotated[int, Field(ge=1, le=8, strict=True)] | None
_LAYER_BITS = TypeAdapter(
    Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*?!\[\]-]{1,128}$")],
            Annotated[list[_Width], Field(min_length=2, max_length=2)],
        ],
        Field(min_length=1, max_length=1000),
    ]
)
_SEED = TypeAdapter(Annotated[Seed, Field(strict=True)])


def _plain(value: Any, key: str, levels: int) -> None:
    """Raise ValueError, naming the key, where a JSON value is out of bounds or has more nested levels than `levels`."""
    try:
        if isinstance(value, str):
            _printable(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not a finite number")
        elif isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
            raise ValueError("a whole number beyond 2^53")
        elif isinstance(value, (dict, list, tuple)) and levels == 0:
            raise ValueError("nested too deep, or a collection where a single value is expected")
        elif not (value is None or isinstance(value, (str, int, float, dict, list, tuple))):
            shown = " ".join(repr(value).split())[:_LONGEST_TEXT]
            raise ValueError(f"{shown} is not text, a number, true, false or null")
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from None
    if isinstance(value, dict):
        for inner in value:
            if not isinstance(inner, str) or not _KEY.fullmatch(inner):
                place = f"{key}: " if key else ""
                raise ValueError(f"{place}{str(inner)[:_LONGEST_TEXT]!r} is not a key: letters, digits, _, - and .")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for inner, item in items:
        _plain(item, f"{key}.{inner}" if key else str(inner), levels - 1)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    _plain(values, "", 1)
    return values


def _check(values: dict[str, Any], key: str, adapter: TypeAdapter[Any]) -> None:
    """Raise ValueError, naming the key, where the adapter refuses its value."""
    try:
        adapter.validate_python(values[key])
    except ValidationError as error:
        raise ValueError(f"{key}: {explain(error)}") from None


def _model(values: dict[str, Any]) -> dict[str, Any]:
    if "bits" in values:
        _check(values, "bits", _LAYER_BITS)
    _plain({key: value for key, value in values.items() if key != "bits"}, "", 1)
    if not isinstance(values.get("name"), str):
        raise ValueError("name: must be the name of a model")
    _named(values)
    return values


def _named(values: dict[str, Any]) -> None:
    try:
        _word(values["name"])
    except ValueError as error:
        raise ValueError(f"name: {error}") from None


def _recipe(values: dict[str, Any]) -> dict[str, Any]:
    special = {"seed": _SEED} | ({"bits": _LAYER_BITS} if values.get("bits") else {})
    for key, adapter in special.items():
        if key in values:
            _check(values, key, adapter)
    _plain({key: value for key, value in values.items() if key not in special}, "", _DEEPEST)
    if "name" in values:
        if not isinstance(values["name"], str):
            raise ValueError("name: must be the name of a recipe")
        _named(values)
    return values


def _device(values: dict[str, Any]) -> dict[str, Any]:
    threads = values.get("threads", 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 4096:
        raise ValueError(f"threads: {threads!r} is not a number of threads, 1 to 4096")
    return values


ModelArguments = Annotated[dict[str, Any], AfterValidator(_model)]
RecipeValues = Annotated[dict[str, Any], AfterValidator(_recipe)]
DeviceFacts = Annotated[dict[str, Any], AfterValidator(_flat), AfterValidator(_device)]
Versions = Annotated[dict[Word, Version], Field(max_length=64)]


class _Preprocessing(BaseModel):
    """The bounds of `Preprocessing.to_dict()`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    size: int = Field(ge=1, le=LARGEST_SIDE)
    mean: list[Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(min_length=1, max_length=3)
    std: list[Annotated[float, Field(ge=1e-6, le=1e6)]] = Field(min_length=1, max_length=3)
    image_size: int | None = Field(default=None, ge=1, le=LARGEST_SIDE)


def _preprocessing(values: dict[str, Any]) -> dict[str, Any]:
    try:
        known = _Preprocessing.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    if known.image_size is not None and known.size > max(_SMALL_SIDE, 2 * known.image_size):
        # memory grows with the square of the size
        raise ValueError(f"size: {known.size}, more than twice the side of the images, image_size {known.image_size}")
    from cnvzoo.data.preprocessing import Preprocessing  # imports torch, which listing checkpoints does not need

    Preprocessing.from_dict(values)
    return values


PreprocessingValues = Annotated[dict[str, Any], AfterValidator(_preprocessing)]
FORMAT_VERSION = 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SeedResult(_Section):
    """The result of one seed of the recipe.

    Attributes:
        seed: seed of the run.
        correct, total: correctly classified test images, and all test images.
        weights_sha256: sha256 of the weights file of the run.
        numerics: version of the training arithmetic of the run; None where its record has none.
    """

    seed: Seed
    correct: Count
    total: Total
    weights_sha256: Sha256
    numerics: Ordinal | None = None


class Trial(_Section):
    """A run that is a trial: it trained another number of epochs than the recipe has, or held images out, or both.

    Attributes:
        epochs: number of epochs trained.
        holdout: number of training images held out and scored instead of the test set; 0 for none.
    """

    epochs: Ordinal
    holdout: Count


class CheckpointFacts(_Section):
    """Everything in a config that is known before the weights file is written.

    Checkpoints of the zoo have all values. In a user's own, what is not known is None or empty.

    Attributes:
        name: the folder's name; `<model tag>.<dataset>` for the zoo's own.
        model: arguments of `cnvzoo.create_model`, the name included.
        dataset: dataset that the model was trained on.
        classes: names of the outputs, in order; where they are not known, "0", "1", and so on.
        preprocessing: `Preprocessing.to_dict()`.
        seed: seed of the run that these weights come from.
        correct, total: correctly classified test images, and all test images; accuracy is their ratio.
        results: results of every seed of the recipe that has been run, this one included.
        weights_sha256: sha256 of the weights file of the run.
        recipe: the whole recipe.
        versions, device, commit: versions, device and commit of the run.
        recipes_scored: how many recipes of this entry were ever scored on the test set, this one included; None where
            that is not known.
        numerics: version of the training arithmetic of the run; None where its record has none.
        trial: what made the run a trial; None for a full one.
    """

    name: Name
    model: ModelArguments
    dataset: Word | None = None
    classes: Classes
    preprocessing: PreprocessingValues
    seed: Seed | None = None
    correct: Count | None = None
    total: Total | None = None
    results: list[SeedResult] = Field(default=[], max_length=1000)
    weights_sha256: Sha256 | None = None
    recipe: RecipeValues = {}
    versions: Versions = {}
    device: DeviceFacts = {}
    commit: Commit | None = None
    recipes_scored: Ordinal | None = None
    numerics: Ordinal | None = None
    trial: Trial | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> CheckpointFacts:
        if (self.correct is None) != (self.total is None):
            raise ValueError("correct and total: give both, or neither")
        if self.correct is not None and self.total is not None and self.correct > self.total:
            raise ValueError("correct: larger than total")
        if self.results or self.weights_sha256 is not None:  # a checkpoint of the zoo
            own: object = (self.seed, self.correct, self.total, self.weights_sha256, self.numerics)
            found: list[object] = [(r.seed, r.correct, r.total, r.weights_sha256, r.numerics) for r in self.results]
            if found.count(own) != 1:
                raise ValueError(f"results: must have seed {self.seed} once, with the numbers of this checkpoint")
        if any(result.correct > result.total for result in self.results):
            raise ValueError("results: correct is larger than total")
        for key, count in (("num_classes", len(self.classes)), ("in_chans", len(self.preprocessing["mean"]))):
            if self.model.get(key) != count:
                raise ValueError(f"model.{key}: {self.model.get(key)!r}, where classes and preprocessing have {count}")
        return self

    @property
    def accuracy(self) -> float | None:
        """Top-1 on the test set, in percent; None where it was not measured."""
        return None if self.correct is None or self.total is None else 100 * self.correct / self.total

    @property
    def score(self) -> str:
        """Accuracy and counts for messages: `91.26 % (9126 of 10000)`, or `not measured`."""
        return "not measured" if self.accuracy is None else f"{self.accuracy:.2f} % ({self.correct} of {self.total})"


class IntegerResult(_Section):
    """The result of a quantized checkpoint's integer graph on the test set, in ONNX Runtime.

    It is only recorded where the outputs equal those of the reference implementation bit for bit.

    Attributes:
        correct: correctly classified test images; the same on every machine.
        agreeing: test images with the same class as in PyTorch.
        differing, reachable: accumulator values that give another activation level than exact arithmetic, n times if
            it is off by n levels, and all that inputs can reach, summed over the channels.
        bytes: size of the ONNX file.
    """

    correct: Count
    agreeing: Count
    differing: Count
    reachable: Total
    bytes: Total


class CheckpointConfig(CheckpointFacts):
    """The whole config.json: what `CheckpointFacts` has, and how it is stored.

    Attributes:
        format_version: version of the format of config.json and model.safetensors.
        file: size and sha256 of model.safetensors.
        integer: result of the integer graph, where it was measured.
    """

    format_version: int
    file: FileFacts
    integer: IntegerResult | None = None

    @field_validator("format_version")
    @classmethod
    def _is_supported(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError(f"{version}, and this cnvzoo reads {FORMAT_VERSION}: install a matching version")
        return version
