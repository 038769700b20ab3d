"""Names of models and of checkpoints: `<model>[_w<W>a<A>][.<dataset>]`, such as `quant_cnv_w4a4.cifar10`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cnvzoo.errors import ModelError
from cnvzoo.models import model_names, model_spec

_BITS = re.compile(r"(.+)_w(\d)a(\d)", re.ASCII)


@dataclass(frozen=True)
class ModelName:
    """A name taken apart.

    Attributes:
        model: as it is registered.
        bits: w_bits and a_bits, where the name has them; else empty.
        dataset: where the name has one.
    """

    model: str
    bits: dict[str, int]
    dataset: str | None


def parse_name(name: str) -> ModelName:
    """Take a name apart. Raises ModelError where its model is not registered."""
    if not isinstance(name, str):
        raise ModelError(f"the name of a model is text, not {name!r}")
    tag, dot, dataset = name.partition(".")
    match = _BITS.fullmatch(tag)
    if tag in model_names() or match is None:
        model, bits = tag, {}
    else:
        model, bits = match[1], {"w_bits": int(match[2]), "a_bits": int(match[3])}
    return ModelName(model_spec(model).name, bits, dataset if dot else None)
