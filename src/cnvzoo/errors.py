"""The errors that users meet, one base class for all, and the "did you mean" that they share."""

from __future__ import annotations

import difflib
import gc
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class CnvzooError(Exception):
    """Base of every error that cnvzoo raises on purpose: bad input, a bad file, an impossible request."""


class ModelError(CnvzooError, ValueError):
    """A model was asked for, or fed, in a way that its topology does not allow."""


def in_a_line(error: BaseException) -> str:
    """What to print of an error in the place of a traceback.

    The message of ours; the file and the reason of the operating system's; of any other its class, its message on one
    line, and the line of code that raised it.
    """
    if isinstance(error, CnvzooError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the valid choices as text, those most like `word` named first: `did you mean 'a'? Choices: a, b`."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Choices: {', '.join(names)}"


def explain(error: ValidationError) -> str:
    """What pydantic found wrong, in one line: `key: what`, for each key."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
        for e in error.errors(include_url=False, include_context=False, include_input=False)
    )


@contextmanager
def without_collection() -> Iterator[None]:
    """No cyclic garbage collection inside; afterwards it is as before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
