"""Size and sha256: by these a file is known, and nothing in it is looked at before both were found right."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from .errors import CheckpointError

LARGEST_FILE = 1 << 30  # bytes; what a config could claim is bounded before memory is taken for it


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class FileFacts:
    """What a file has to be: its sha256 in hexadecimal, and its size in bytes (up to 1 GiB)."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0, le=LARGEST_FILE)

    @classmethod
    def of(cls, content: bytes) -> FileFacts:
        return cls(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def read_verified(path: Path, facts: FileFacts) -> bytes:
    """The content of a file, which is what `facts` say: what is returned is what was hashed.

    Raises:
        CheckpointError: it cannot be read, or has another size or sha256.
    """
    remedy = "the file is damaged, or another than was published: fetch it again"
    content = read_limited(path, facts.size, f"expected {facts.size:,} bytes, and it has more: {remedy}")
    if len(content) != facts.size:
        raise CheckpointError(f"{path}: expected {facts.size:,} bytes, and it has {len(content):,}: {remedy}")
    found = hashlib.sha256(content).hexdigest()
    if found != facts.sha256:
        raise CheckpointError(f"{path}: sha256 is {found[:16]}..., and {facts.sha256[:16]}... was expected: {remedy}")
    return content


def read_limited(path: Path, limit: int, too_large: str) -> bytes:
    """The content of a regular file of at most `limit` bytes; no more memory than that is ever taken.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or is larger, for which `too_large` are the words.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if found.st_size > limit:
            raise CheckpointError(f"{path}: {too_large}")
        with path.open("rb") as file:
            content = file.read(found.st_size + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({reason}): is {path.parent} a checkpoint folder?") from None
    if len(content) != found.st_size:
        raise CheckpointError(f"{path}: changed while it was read: try again")
    return content
