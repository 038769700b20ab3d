"""What the published files are known by."""

from __future__ import annotations

from typing import NamedTuple


class FileFacts(NamedTuple):
    """A file's sha256, in hexadecimal, and its size in bytes."""

    sha256: str
    size: int
