"""The description of the distribution on a package index: README.md, with paths in place of its links to files.

A relative link works only beside the files; the page of a package index does not have them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_NOTE = "\n\nPaths are those of files in the source distribution.\n"
_LINK_TO_FILE = re.compile(r"!?\[([^\]]+)\]\((?![a-z]+:|#)([^)]+)\)")


class DescriptionFromReadme(MetadataHookInterface):
    """The `custom` metadata hook of pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the `readme` of the project table."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_paths(text).rstrip() + _NOTE}


def with_paths(page: str) -> str:
    """A page of Markdown with "text (`path`)" for each link or picture that has a relative path as its target."""
    return _LINK_TO_FILE.sub(lambda link: f"`{link[2]}`" if link[1] == link[2] else f"{link[1]} (`{link[2]}`)", page)
