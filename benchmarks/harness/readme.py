"""The results on the README: a table between two markers, which follows the records as the page of results does."""

from __future__ import annotations

from pathlib import Path

from cnvzoo.files import update_text

START, END = "<!-- results -->", "<!-- /results -->"


def update(path: Path, table: str) -> None:
    """Put `table` between the markers of the README at `path`; one that is not there, or has no markers, is left be."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    updated = f"{before}{start}\n\n{table}\n\n{end}{after}"
    if start and end:
        update_text(path, updated)
