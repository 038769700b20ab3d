"""Errors of this library, and functions that turn errors into one-line messages.

The base class is that of cnvzoo_runtime, whose errors are errors of this library too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cnvzoo_runtime.errors import CnvzooError, in_a_line

if TYPE_CHECKING:
    from pydantic import ValidationError


__all__ = ["CnvzooError", "DatasetError", "ModelError", "explain", "in_a_line", "nearest"]


class DatasetError(CnvzooError, ValueError):
    """A dataset that is unknown, cannot be loaded, or has other data than it should."""


class ModelError(CnvzooError, ValueError):
    """An unknown model, an invalid argument of a model, or input that the model does not take."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The valid choices as text, after those most similar to `word`: `did you mean 'a'? Choices: a, b`."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Choices: {', '.join(names)}"


def explain(error: ValidationError) -> str:
    """The mistakes that pydantic found, in one line: `key: mistake; key: mistake`."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
        for e in error.errors(include_url=False, include_context=False, include_input=False)
    )
