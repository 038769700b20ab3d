"""The state of the fake Hub: repositories, their commits and files, and the planned faults."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_hash(self) -> str:
        stored = self._pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_hash

    @property
    def _pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    def described(self) -> dict[str, Any]:
        lfs = {"sha256": self.sha256, "oid": self.sha256, "size": len(self.content), "pointerSize": len(self._pointer)}
        facts = {"size": len(self.content), "blobId": self.git_hash, "oid": self.git_hash}
        return facts | ({"lfs": lfs} if self.is_lfs else {})


@dataclass(frozen=True)
class Commit:
    message: str
    parent: str | None
    files: dict[str, Blob]

    @property
    def id(self) -> str:
        listing = sorted((name, blob.etag) for name, blob in self.files.items())
        return hashlib.sha1(repr((self.message, self.parent, listing)).encode()).hexdigest()


@dataclass
class Repo:
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # besides main

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        wanted = (self.branches | self.tags).get(revision, revision)
        return next((commit for commit in self.commits if commit.id == wanted), None)


@dataclass
class Fault:
    """A planned failure: `cut`, `cut_after`, `truncated`, `wrong`, `drip`, `stall`, or a status with a message."""

    kind: str | int
    times: float
    headers: dict[str, str]
    says: str = "injected"
