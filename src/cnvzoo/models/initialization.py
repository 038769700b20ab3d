"""Building a model whose values come from a file: the initialisation, most of the time that it takes, is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_skipped: ContextVar[bool] = ContextVar("initialization_skipped", default=False)


@contextmanager
def without_initialization() -> Iterator[None]:
    """Models built inside may have any values: every one of them has to be loaded."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def skips_initialization() -> bool:
    """Whether what is only a start for training can be left out, here and now."""
    return _skipped.get()
