"""A strict reader of YAML files, whose errors name the line and the key.

PyYAML's loaders follow YAML 1.1, where `010` is 8, `1:30` is 90, `no` is false, the last of two equal keys wins, and
aliases make a huge value of a short file. Here scalars follow the core schema of YAML 1.2.2 (section 10.3), sizes are
limited, and features that settings do not need are refused: anchors, aliases, merge keys, tags, directives and a second
document. Only PyYAML's parser is used, for the structure and the lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from cnvzoo.errors import CnvzooError, nearest

Where = dict[tuple[str, ...], str]  # key path -> "file:line"
_MAX_BYTES = 64 * 1024  # the longest recipe has 4 KiB
_MAX_DEPTH = 16
_MAX_NUMBER = 40  # characters; 17 digits give a float exactly
_MAX_SHOWN = 80  # characters of a value in a message
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class StrictYamlError(CnvzooError, ValueError):
    """An invalid file; the message names file, line and key, the mistake, and the remedy."""


@dataclass(frozen=True)
class YamlFile:
    """The content of a file.

    Attributes:
        values: None, bool, int, float, str, lists, and dicts with str keys; None for an empty file.
        where: the place of every key and of every item of a list, whose index is its key.
    """

    values: Any
    where: Where


def read_yaml(path: Path) -> YamlFile:
    """Read a YAML file.

    Raises:
        StrictYamlError: not UTF-8, larger than 64 KiB, nested deeper than 16 levels, not valid YAML, a repeated key,
            or a feature of YAML that is refused (see the module).
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise StrictYamlError(f"{path}: larger than {_MAX_BYTES:,} bytes, the limit: check that it is the right file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StrictYamlError(f"{path}:{line}: not UTF-8 text: save it as UTF-8") from None
    try:
        return _Composer(str(path), yaml.parse(text, Loader=yaml.SafeLoader)).document()
    except yaml.YAMLError as error:
        raise StrictYamlError(_invalid(error, text, path)) from None
    except (ValueError, OverflowError) as error:  # PyYAML does not check escapes and directives
        if isinstance(error, StrictYamlError):
            raise
        raise StrictYamlError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def place_of(where: Where, path: tuple[str, ...], otherwise: str) -> str:
    """The place of the key `path`, else of its innermost section that has one, else `otherwise`."""
    return next((where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in where), otherwise)


def error_at(key: str, message: str) -> PydanticCustomError:
    """For validators of several keys: an error that `explain_with_lines` reports at `key`, relative to the section."""
    return PydanticCustomError("at_key", "{message}", {"key": key, "message": message})


def explain_with_lines(
    error: ValidationError, model: type[BaseModel], where: Where, source: str, keys: Sequence[str] | None = None
) -> str:
    """The mistakes that pydantic found in the values of a file, one line each, with place, key and remedy.

    Args:
        error: from the validation as `model`. Errors of the type "at_key" have the wrong `key` in their context.
        model: the type that the values were validated as.
        where: places of the keys; `source` is named for a key that has none.
        keys: the keys that a file may have at its top, where they are not those of `model`.
    """
    return "\n".join(_explain(dict(mistake), model, where, source, keys) for mistake in error.errors())


def _explain(
    mistake: dict[str, Any], model: type[BaseModel], where: Where, source: str, keys: Sequence[str] | None
) -> str:
    inner = mistake["ctx"]["key"].split(".") if mistake["type"] == "at_key" else []
    path = tuple(str(part) for part in (*mistake["loc"], *inner))
    place, key = place_of(where, path, source), ".".join(path)
    if mistake["type"] == "extra_forbidden":
        choices = _keys(model, path[:-1]) if keys is None or path[:-1] else keys
        return f"{place}: {key}: unknown key: {nearest(path[-1], choices)}"
    if mistake["type"] == "missing":
        return f"{place}: {key}: missing: add it"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] in ("value_error", "at_key"):
        return f"{place}: {key + ': ' if key else ''}{message}"
    return f"{place}: {key}: {_shown(repr(mistake['input']))}: {message[:1].lower()}{message[1:]}"


def _keys(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The valid keys of the section at `path`."""
    section: Any = model
    for key in path:
        options = _options(section)
        inner = next((get_args(option)[-1] for option in options if get_origin(option) in (dict, list)), None)
        section = inner or next(option.model_fields[key].annotation for option in options if _is_model(option))
    return [key for option in _options(section) if _is_model(option) for key in option.model_fields]


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_model(annotation: Any) -> bool:
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)


class _Composer:
    """Builds values from the parser's events, and records the place of each key."""

    def __init__(self, file: str, events: Iterator[yaml.Event]) -> None:
        self._file = file
        self._events = events
        self._where: Where = {}

    def document(self) -> YamlFile:
        next(self._events)  # the start of the stream
        start = next(self._events)
        if isinstance(start, yaml.StreamEndEvent):
            return YamlFile(None, {})
        assert isinstance(start, yaml.DocumentStartEvent)
        if start.version or start.tags:
            raise self._refusal(start, (), "a directive (%): remove it; files are read as YAML 1.2")
        values = self._value(next(self._events), (), 0)
        next(self._events)  # the end of the document
        if not isinstance(after := next(self._events), yaml.StreamEndEvent):
            raise self._refusal(after, (), "a second document: put it in another file")
        return YamlFile(values, self._where)

    def _value(self, event: yaml.Event, path: tuple[str, ...], depth: int) -> Any:
        self._check_plain(event, path)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if depth == _MAX_DEPTH:
            raise self._refusal(event, path[:4], f"nested deeper than {_MAX_DEPTH} levels: make it flat")
        return (self._list if isinstance(event, yaml.SequenceStartEvent) else self._mapping)(path, depth)

    def _list(self, path: tuple[str, ...], depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            here = (*path, str(len(items)))
            self._where[here] = self._place(event)
            items.append(self._value(event, here, depth + 1))
        return items

    def _mapping(self, path: tuple[str, ...], depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, path)
            here = (*path, key)
            if key in values:
                raise self._refusal(event, here, f"repeated key, first at {self._where[here]}: keep one")
            self._where[here] = self._place(event)
            values[key] = self._value(next(self._events), here, depth + 1)
        return values

    def _key(self, event: yaml.Event, path: tuple[str, ...]) -> str:
        self._check_plain(event, path)
        if not isinstance(event, yaml.ScalarEvent):
            raise self._refusal(event, path, "a list or mapping as a key: keys must be text")
        if event.value == "<<" and event.style is None:
            raise self._refusal(event, path, "a merge key (<<): write the keys out")
        key = self._scalar(event, path)
        if not isinstance(key, str) or not key.isprintable():
            raise self._refusal(event, path, f"{_shown(event.value)!r} as a key: keys must be text on one line")
        return key

    def _check_plain(self, event: yaml.Event, path: tuple[str, ...]) -> None:
        """Refuse aliases, anchors and tags, which change the meaning of what is written."""
        if isinstance(event, yaml.AliasEvent):
            raise self._refusal(event, path, f"an alias (*{event.anchor}): write the value out")
        assert isinstance(event, yaml.NodeEvent)
        if event.anchor is not None:
            raise self._refusal(event, path, f"an anchor (&{event.anchor}): write the value out where it is used")
        if tag := getattr(event, "tag", None):
            raise self._refusal(event, path, f"a tag ({_shown(tag)}): leave it out; the value itself has a type")

    def _scalar(self, event: yaml.ScalarEvent, path: tuple[str, ...]) -> bool | int | float | str | None:
        text = event.value
        if event.style is not None:  # in quotes or a block
            return self._text(event, path)
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        is_integer = _INTEGER.fullmatch(text)
        if not (is_integer or _OTHER_BASE.fullmatch(text) or _FLOAT.fullmatch(text)):
            return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else self._text(event, path)
        if len(text) > _MAX_NUMBER:
            raise self._refusal(
                event, path, f"a number of {len(text):,} characters: write it with at most {_MAX_NUMBER}"
            )
        if _LEADING_ZERO.fullmatch(text):
            choices = {int(text): str(int(text))}
            if not set(text) & set("89") and int(text, 8) not in choices:
                choices[int(text, 8)] = f"{int(text, 8)} if it is octal"
            remedy = f"write {', or '.join(choices.values())}"
            raise self._refusal(event, path, f"{text}: a leading zero, octal in YAML 1.1: {remedy}")
        if is_integer:
            return int(text)
        if _OTHER_BASE.fullmatch(text):
            return int(text, 0)
        if math.isinf(value := float(text)):
            raise self._refusal(event, path, f"{text}: too large for a float: write .inf for infinity")
        return value

    def _text(self, event: yaml.ScalarEvent, path: tuple[str, ...]) -> str:
        if any("\ud800" <= character <= "\udfff" for character in event.value):  # by an escape like "\ud800"
            raise self._refusal(event, path, "half of a surrogate pair: write the character as \\U and 8 digits")
        return event.value

    def _place(self, event: yaml.Event) -> str:
        return f"{self._file}:{event.start_mark.line + 1}"

    def _refusal(self, event: yaml.Event, path: tuple[str, ...], message: str) -> StrictYamlError:
        key = f"{'.'.join(path)}: " if path else ""
        return StrictYamlError(f"{self._place(event)}: {key}{message}")


def _invalid(error: yaml.YAMLError, text: str, path: Path) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        message = str(error.problem or error.context)
        if error.problem and error.context:
            since = f" from line {error.context_mark.line + 1} on" if error.context_mark else ""
            message += f", {error.context}{since}"
    else:
        assert isinstance(error, yaml.reader.ReaderError)
        line = text.count("\n", 0, error.position) + 1
        message = f"the character U+{ord(text[error.position]):04X}, which YAML does not allow"
    return f"{path}:{line}: not valid YAML: {' '.join(message.split())}"


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
