"""The base class of all errors of this library, and functions that turn errors into one-line messages."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class CnvzooError(Exception):
    """Base class of the errors that cnvzoo raises for invalid input: an argument, a file, or a request."""


class ModelError(CnvzooError, ValueError):
    """An unknown model, an invalid argument of a model, or input that the model does not take."""


def in_a_line(error: BaseException) -> str:
    """The message to print instead of a traceback.

    For a CnvzooError, its message; for an OSError, the file and the reason; for any other error, its class, its message
    on one line, and the file and line of the code that raised it.
    """
    if isinstance(error, CnvzooError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


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
