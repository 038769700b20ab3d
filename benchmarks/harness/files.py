"""Two small things with paths that more than one part of the harness does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def shown(path: Path) -> str:
    """`path` as a person would type it: relative to the working directory where it lies below that."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def set_aside(folder: Path) -> Path:
    """Rename `folder` to `<name>.previous`, in place of an earlier one, and return that path."""
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)
    return previous
