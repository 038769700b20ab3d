"""The commit that a run was made from, so that its record can be traced to the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def current_commit() -> str | None:
    """The commit of the checkout that this package runs from, `+` at its end if the package differs from it.

    None where the package is not in a checkout of its own repository, or git is not there.
    """

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=_PACKAGE, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != _PACKAGE.parents[1]:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(_PACKAGE)) else "")
    except (OSError, subprocess.SubprocessError):
        return None
