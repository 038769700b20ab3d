"""What goes wrong with checkpoints.

What goes through a store: the files of one checkpoint, under names that lead nowhere else, and what became of them.

A name that reaches a store may come from a command line, an index or a server. Only plain names are let through, so
that nothing can be read or written outside of the folder that is meant.

Which folders of a directory are checkpoints, and which files of a folder are a checkpoint's, is decided here alone:
publishing, the index and the search by name have to agree on it.


The index: every published checkpoint, with size and sha256 of its files. It ships inside the package.

So what a checkpoint is does not depend on where it is fetched from. `index.json` is rendered from the published
folders by `benchmarks/reproduce.py`; nobody writes it by hand.


Size and sha256: by these a file is known, and nothing in it is looked at before both were found right.

What may stand in a config: every value of it is bounded, and can be printed.

A config may come from anyone. A model is built from it, memory is taken for images of the size that it names, and its
card has a command that people copy into a shell. So what no run writes is refused when the config is read, naming its
key; the card quotes and escapes what is left all the same.


A checkpoint: a folder `<model tag>.<dataset>/` with `model.safetensors` and `config.json`.

The config says everything that is needed to build the model, feed it, and check the number that it is published with.
No file is looked into before its size and sha256 were found to be those that it was published with.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.errors import CnvzooError, explain


class CheckpointError(CnvzooError):
    """A checkpoint that is missing, damaged or does not fit: names the file and what was expected."""


class StoreError(CheckpointError):
    """A checkpoint that a store does not give, or does not take: what was asked, what came back, what to do."""


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
LARGEST_FILE = 1 << 30  # bytes; what a config could claim is bounded before memory is taken for it


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class FileFacts:
    """What a file has to be: its sha256 in hexadecimal, and its size in bytes (up to 1 GiB)."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0, le=LARGEST_FILE)

    @classmethod
    def of(cls, content: bytes) -> FileFacts:
        return cls(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


LARGEST_SIDE = 1024  # pixels
_LONGEST_TEXT = 200  # characters
_LARGEST_WHOLE = 2**53  # what every reader of JSON has exactly
_DEEPEST = 6  # levels of nested values
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


def _printable(text: str) -> str:
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(text):,} characters, where {_LONGEST_TEXT} are allowed")
    if not text.isprintable():
        raise ValueError(f"{text!r} has a character that cannot be printed, such as a line break")
    return text


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text[:_LONGEST_TEXT]!r} is not a name: up to 128 letters, digits, _, - and .")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
Word = Annotated[str, AfterValidator(_word)]  # a name that is one word in a shell, and no option
Count = Annotated[int, Field(ge=0, le=_LARGEST_WHOLE)]
Total = Annotated[int, Field(gt=0, le=_LARGEST_WHOLE)]
Ordinal = Annotated[int, Field(ge=1, le=_LARGEST_WHOLE)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}\+?$")]  # with + at its end, of a checkout that had changes
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+!_-]{0,63}$")]
Classes = Annotated[list[Text], Field(min_length=1, max_length=10_000)]


def _plain(value: Any, key: str, levels: int) -> None:
    """Raise ValueError, naming the key, for what is neither null, true, false, a number, a text nor nested of these."""
    try:
        if isinstance(value, str):
            _printable(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not a finite number")
        elif isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
            raise ValueError("a whole number beyond 2^53")
        elif isinstance(value, (dict, list)) and levels == 0:
            raise ValueError("values nested too deep, or where there is to be one")
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from None
    if isinstance(value, dict):
        for inner in value:
            if not isinstance(inner, str) or not _KEY.fullmatch(inner):
                place = f"{key}: " if key else ""
                raise ValueError(f"{place}{str(inner)[:_LONGEST_TEXT]!r} is not a key: letters, digits, _, - and .")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for inner, item in items:
        _plain(item, f"{key}.{inner}" if key else str(inner), levels - 1)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    _plain(values, "", 1)
    return values


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    _plain(values, "", _DEEPEST)
    return values


def _model(values: dict[str, Any]) -> dict[str, Any]:
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


ModelArguments = Annotated[dict[str, Any], AfterValidator(_flat), AfterValidator(_model)]
RecipeValues = Annotated[dict[str, Any], AfterValidator(_nested), AfterValidator(_recipe)]
DeviceFacts = Annotated[dict[str, Any], AfterValidator(_flat), AfterValidator(_device)]
Versions = Annotated[dict[Word, Version], Field(max_length=64)]


class _Preprocessing(BaseModel):
    """`Preprocessing.to_dict()`, of images that a small classifier takes."""

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
    if known.image_size is not None and known.size > 2 * known.image_size:  # memory goes with its square
        raise ValueError(f"size: {known.size}, more than twice the side of the images, image_size {known.image_size}")
    Preprocessing.from_dict(values)
    return values


PreprocessingValues = Annotated[dict[str, Any], AfterValidator(_preprocessing)]
FORMAT_VERSION = 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
