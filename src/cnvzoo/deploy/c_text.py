"""Text of C: identifiers, comments, strings and lists of constants."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDTH = 116  # characters of a line of constants
_INT_MIN = {"int32": "-2147483647 - 1", "int64": "-9223372036854775807 - 1"}


def identifier(name: str) -> str:
    """A name of letters, digits and single underscores, as part of an identifier; `net` where nothing is left."""
    text = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "net"
    return f"net_{text}" if text[0].isdigit() else text


def comment(text: str) -> str:
    """Text inside a comment."""
    return text.replace("*/", "* /").replace("/*", "/ *").replace("??/", "? ?/")


def string(text: str) -> str:
    """A string literal, in UTF-8."""
    escaped = (chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(escaped)}"'


def constants(values: NDArray[Any]) -> str:
    """The lines of an initializer."""
    least = np.iinfo(values.dtype).min
    flat = values.reshape(-1).tolist()
    words = [_INT_MIN[values.dtype.name] if v == least and v < 0 else str(v) for v in flat]
    if values.dtype == np.int64:
        words = [f"INT64_C({word})" for word in words]
    lines, line = [], "   "
    for word in words:
        if len(line) + len(word) + 2 > _WIDTH:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([*lines, line])


def designated(fields: Mapping[str, Any]) -> str:
    """An initializer with designators, several in a line."""
    lines, line = [], "   "
    for key, value in fields.items():
        word = f".{key} = {value}"
        if len(line) + len(word) + 2 > _WIDTH:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join(["{", *lines, line, "}"])
