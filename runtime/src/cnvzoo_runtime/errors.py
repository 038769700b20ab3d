"""The base class of all errors of cnvzoo and of this package, and how commands print errors and names."""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path


class CnvzooError(Exception):
    """Base class of the errors for invalid arguments, invalid files, and what cannot be done with them."""


def in_a_line(error: BaseException) -> str:
    """The message to print instead of a traceback.

    For a CnvzooError, its message, whose lines are joined, since it may quote another library; for an OSError, the file
    and the reason; for any other error, its class, its message on one line, and the file and line of the code that
    raised it.
    """
    if isinstance(error, CnvzooError):
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def show_every_character() -> None:
    """Have the standard output print characters that it cannot encode as escapes, such as those of some file names."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
