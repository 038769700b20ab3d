"""Sending the checkpoints of entries to where people find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cnvzoo

from .entries import Entry
from .layout import Layout


def publish_checkpoints(
    entries: Iterable[Entry], layout: Layout, to: str, *, tag: str | None, dry_run: bool, say: Callable[[str], None]
) -> None:
    """Publish the checkpoints that the entries have, and print a line for each.

    Raises CheckpointError where one is not whole, or the store does not take it.
    """
    folders = {entry.name: layout.checkpoint(entry.recipe) for entry in entries}
    if missing := [name for name, folder in folders.items() if not folder.is_dir()]:
        say(f"no checkpoint to publish yet: {', '.join(missing)}")
    present = [folder for folder in folders.values() if folder.is_dir()]
    cnvzoo.publish(present, to, tag=tag, dry_run=dry_run, on_published=print)
