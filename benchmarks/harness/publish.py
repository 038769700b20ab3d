"""Sending the checkpoints of entries to where people find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cnvzoo
from cnvzoo.hub.publication import checkpoint_folders

from .entries import Entry
from .layout import Layout


def publish_checkpoints(
    entries: Iterable[Entry], layout: Layout, to: str, *, tag: str | None, dry_run: bool, say: Callable[[str], None]
) -> None:
    """Publish the checkpoints that the entries have, and print a line for each.

    Raises CheckpointError where one is not whole, or the store does not take it.
    """
    folders = {entry.name: layout.checkpoint(entry.recipe) for entry in entries}
    whole = checkpoint_folders(layout.hub).values()  # the config is written last: without it a folder is none yet
    if missing := [name for name, folder in folders.items() if folder not in whole]:
        say(f"no checkpoint to publish yet: {', '.join(missing)}")
    present = [folder for folder in folders.values() if folder in whole]
    cnvzoo.publish(present, to, tag=tag, dry_run=dry_run, on_published=print)
