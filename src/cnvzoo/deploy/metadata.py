"""What an exported file says of itself: everything that its user needs beside the graph, as JSON in the ONNX file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from cnvzoo.errors import CnvzooError


class DeployError(CnvzooError, ValueError):
    """A model that the format cannot express, a file that is not ours, or images that a file cannot take."""


KEY = "cnvzoo"  # of ONNX's metadata_props
VERSION = 1
FORMATS = ("integer", "qonnx", "onnx")


@dataclass(frozen=True)
class Metadata:
    """Of an exported model.

    Attributes:
        format: `integer`, `qonnx` or `onnx`.
        name: of the checkpoint or model.
        dataset: what it was trained on, or None where that is not known.
        classes: names of the outputs, in order.
        size: side in pixels of the graph's square input.
        image_size: side in pixels of the images before they are padded to `size`.
        mean, std: per channel, in units of [0, 1]; what the input of an `onnx` file is normalised with. 0 and 1 in
            the others.
        scale: what makes logits of the accumulators of an `integer` file; 1 in the others.
        w_bits, a_bits: bit widths of weights and activations; None for float models.
        version: of this layout.
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
        """The inverse of `to_json`; `source` is named where something is wrong.

        Raises:
            DeployError: not what `to_json` writes.
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
            raise ValueError("classes has to be names")
        if self.in_chans not in (1, 3) or len(self.std) != self.in_chans:
            raise ValueError("mean and std must have 1 or 3 values")
        numbers = (*self.mean, *self.std, self.scale)
        if (
            not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
            or min(*self.std, self.scale) <= 0
        ):
            raise ValueError("mean, std and scale have to be finite, std and scale positive")
        margin = self.size - self.image_size
        if self.image_size < 1 or margin < 0 or margin % 2:
            raise ValueError(f"images of side {self.image_size} do not pad to {self.size}")
