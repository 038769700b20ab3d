"""Where checkpoints are: `CNVZOO_HUB` if it is set, else the `hub/` of the checkout that this package runs from."""

from __future__ import annotations

import os
from pathlib import Path

from cnvzoo.errors import nearest

from .checkpoint import CONFIG, CheckpointError

_CHECKOUT_HUB = Path(__file__).resolve().parents[3] / "hub"


def hub_folder() -> Path:
    """The folder that holds checkpoints, one folder each; it need not exist."""
    return Path(os.environ["CNVZOO_HUB"]) if os.environ.get("CNVZOO_HUB") else _CHECKOUT_HUB


def checkpoint_names() -> list[str]:
    """Names of the checkpoints in the hub folder, sorted."""
    return sorted(config.parent.name for config in hub_folder().glob(f"*/{CONFIG}"))


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint, given by its path or by its name in the hub folder.

    Raises:
        CheckpointError: there is none; with the nearest names.
    """
    for folder in (Path(name), hub_folder() / name):
        if (folder / CONFIG).is_file():
            return folder
    known = checkpoint_names()
    choices = nearest(name, known) if known else "that folder has none; CNVZOO_HUB names another"
    raise CheckpointError(f"no checkpoint {name!r}, neither as a folder nor in {hub_folder()}: {choices}")
