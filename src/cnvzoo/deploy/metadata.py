"""The metadata of an exported file: all that its user needs besides the graph, as JSON in the ONNX file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from cnvzoo.errors import CnvzooError


class DeployError(CnvzooError, ValueError):
    """A model that a format cannot express, a file that cnvzoo did not export, or images that a model cannot take."""


KEY = "cnvzoo"  # key in ONNX's metadata_props
VERSION = 1  # of this layout
FORMATS = ("integer", "qonnx", "onnx")


@dataclass(frozen=True)
class Metadata:
    """The metadata of an exported model.

    Attributes:
        format: `integer`, `qonnx` or `onnx`.
        name: name of the checkpoint or model.
        dataset: dataset that it was trained on, or None if unknown.
        classes: names of the outputs, in order.
        size: side of the graph's square input, in pixels.
        image_size: side of the images before they are padded to `size`, in pixels.
        mean, std: normalisation of the input of an `onnx` file, per channel, for pixels from 0 to 1; 0 and 1 in other
            formats.
        scale: logits = scale * accumulators in an `integer` file; 1 in other formats.
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

    @classmethod
    def from_json(cls, text: str, source: str) -> Metadata:
        """The inverse of `to_json`; error messages name `source`.

        Raises:
            DeployError: `text` was not written by `to_json`, or by another version of it.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values.get("version") != VERSION:
                raise ValueError(f"version {values.get('version')!r}, and this cnvzoo reads {VERSION}")
            values |= {key: tuple(values[key]) for key in ("classes", "mean", "std")}
            found = cls(**values)
            found._check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DeployError(f"{source}: its metadata {KEY!r} is damaged: {error}; export it again") from None
        return found

    def _check(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is none of {', '.join(FORMATS)}")
        if not all(isinstance(c, str) for c in self.classes) or not self.classes:
            raise ValueError("classes must be names")
        if self.in_chans not in (1, 3) or len(self.std) != self.in_chans:
            raise ValueError("mean and std must have 1 or 3 values")
        numbers = (*self.mean, *self.std, self.scale)
        if (
            not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
            or min(*self.std, self.scale) <= 0
        ):
            raise ValueError("mean, std and scale must be finite, and std and scale positive")
        margin = self.size - self.image_size
        if self.image_size < 1 or margin < 0 or margin % 2:
            raise ValueError(f"images of side {self.image_size} do not pad to {self.size}")
