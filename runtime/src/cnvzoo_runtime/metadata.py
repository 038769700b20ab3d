"""The metadata of an exported file: what is needed to use its graph, as JSON in the ONNX file."""

from __future__ import annotations

import json
import operator
import unicodedata
from dataclasses import asdict, dataclass, fields
from typing import Any

from cnvzoo_runtime.errors import CnvzooError


class DeployError(CnvzooError, ValueError):
    """A model that a format cannot express, a file that cnvzoo did not export, or images that a model cannot take."""


KEY = "cnvzoo"  # key in ONNX's metadata_props
VERSION = 1  # of this layout
ONNX_FORMATS = ("integer", "qdq", "qonnx", "onnx")
FORMATS = (*ONNX_FORMATS, "c")
_LARGEST_TEXT = 1 << 20  # characters of JSON
_LARGEST_SIDE = 1024  # pixels
_MOST_CLASSES = 10_000
_LARGEST_NUMBER = 1e38  # of float32
_LONGEST_QUOTE = 60  # characters of a value in a message


@dataclass(frozen=True)
class Metadata:
    """The metadata of an exported model.

    Attributes:
        format: `integer`, `qdq`, `qonnx` or `onnx`; `c`, of C source, is in no file.
        name: name of the checkpoint or model.
        dataset: dataset that it was trained on, or None if unknown.
        classes: names of the outputs, in order.
        size: side of the graph's square input, in pixels.
        image_size: side of the images before they are padded to `size`, in pixels.
        mean, std: normalisation of the input of an `onnx` file, per channel, for pixels from 0 to 1; 0 and 1 in other
            formats.
        scale: logits = scale * accumulators in an `integer` file, or scale * scores of `c`; 1 in other formats.
        w_bits, a_bits: bit widths of weights and activations; None for float models.
        version: version of this layout.
    """

    format: str
    name: str
    dataset: str | None
    classes: tuple[str, ...]
    size: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0
    w_bits: int | None = None
    a_bits: int | None = None
    version: int = VERSION

    @property
    def in_chans(self) -> int:
        return len(self.mean)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def check(self) -> None:
        """Raise DeployError, naming the value, where `from_json` would refuse what `to_json` writes."""
        try:
            _checked({key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()})
            _decoded(self.to_json())
        except ValueError as error:
            raise DeployError(f"{_quoted(self.name)} cannot be exported: {error}") from None

    @classmethod
    def from_json(cls, text: str, source: str) -> Metadata:
        """The inverse of `to_json`; error messages name `source`.

        Raises:
            DeployError: `text` was not written by `to_json`, or by another version of it.
        """
        try:
            return cls(**_checked(_decoded(text)))
        except ValueError as error:
            raise DeployError(f"{source}: its metadata {KEY!r} is damaged: {error}; export it again") from None


def _decoded(text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises ValueError where it is anything else."""
    if len(text) > _LARGEST_TEXT:
        raise ValueError(f"{len(text):,} characters, where {_LARGEST_TEXT:,} are allowed")
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is expected, not {_quoted(values)}")
    return values


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with tuples in place of lists. Raises ValueError for what `Metadata.to_json` does not write."""
    if not _is_whole(values.get("version"), VERSION, VERSION):
        raise ValueError(f"version {_quoted(values.get('version'))}, and this cnvzoo reads {VERSION}")
    names = {field.name for field in fields(Metadata)}
    for problem, keys in (("missing", names - values.keys()), ("unknown", values.keys() - names)):
        if keys:
            raise ValueError(f"{_quoted(min(keys))} is {problem}")
    if values["format"] not in ONNX_FORMATS:
        raise ValueError(f"format {_quoted(values['format'])} is not one of {', '.join(ONNX_FORMATS)}")
    for key in ("name", "dataset"):
        if not (_is_text(values[key]) or (key == "dataset" and values[key] is None)):
            raise ValueError(f"{key} {_quoted(values[key])} must be printable text")
    classes, mean, std = (values[key] for key in ("classes", "mean", "std"))
    if not isinstance(classes, list) or not 1 <= len(classes) <= _MOST_CLASSES:
        raise ValueError(f"classes must be 1 to {_MOST_CLASSES:,} printable names")
    for number, name in enumerate(classes):
        if not _is_text(name):
            raise ValueError(f"class {number}, {_quoted(name)}, must be a printable name")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) and len(mean) in (1, 3)):
        raise ValueError("mean and std must have 1 or 3 values")
    numbers = {"mean": mean, "std": std, "scale": [values["scale"]]}
    if not all(_is_finite(v) for row in numbers.values() for v in row) or min(*std, values["scale"]) <= 0:
        raise ValueError("mean, std and scale must be finite, and std and scale positive")
    if values["format"] != "onnx" and ({*mean} != {0} or {*std} != {1}):
        raise ValueError(f"mean and std must be 0 and 1 in format {values['format']}, whose input is pixels")
    _check_sizes(values["size"], values["image_size"])
    for key in ("w_bits", "a_bits"):
        if values[key] is not None and not _is_whole(values[key], 1, 8):
            raise ValueError(f"{key} {_quoted(values[key])} is not a bit width, 1 to 8")
    return values | {"classes": tuple(classes), "mean": tuple(mean), "std": tuple(std)}


def _check_sizes(size: Any, image_size: Any) -> None:
    for key, side in (("size", size), ("image_size", image_size)):
        if not _is_whole(side, 1, _LARGEST_SIDE):
            raise ValueError(f"{key} {_quoted(side)} is not a whole number of pixels, 1 to {_LARGEST_SIDE}")
    if size < image_size or (size - image_size) % 2:
        raise ValueError(f"images of {image_size} pixels cannot be padded equally to {size}")


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number in the range of float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and is_printable(value)


def is_printable(text: str) -> bool:
    """Whether text can be shown in a line: spaces of every kind can, line breaks and control characters cannot."""
    return all(character.isprintable() or unicodedata.category(character) == "Zs" for character in text)


def whole_number(value: Any) -> int | None:
    """`value` as an int if it is a whole number of any type (numpy's too) but bool, else None."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy.bool, once numpy.bool_
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


def _quoted(value: Any) -> str:
    return repr(value)[:_LONGEST_QUOTE]
