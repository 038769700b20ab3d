"""What may stand in a config: every value of it is bounded, and can be printed.

A config may come from anyone. A model is built from it, memory is taken for images of the size that it names, and its
card has a command that people copy into a shell. So what no run writes is refused when the config is read, naming its
key; the card quotes and escapes what is left all the same.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cnvzoo.data import Preprocessing
from cnvzoo.errors import explain

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
