"""The errors that users meet, one base class for all, and the "did you mean" that they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class CnvzooError(Exception):
    """Base of every error that cnvzoo raises on purpose: bad input, a bad file, an impossible request."""


class ModelError(CnvzooError, ValueError):
    """A model was asked for, or fed, in a way that its topology does not allow."""


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
