"""Publishing checkpoint folders to a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cnvzoo.checkpoints.folder import checkpoint_files, checkpoint_folders, read_model
from cnvzoo.checkpoints.format import CheckpointError, StoreError
from cnvzoo.checkpoints.locations import folder_hint, is_path, open_store, printable, store_location
from cnvzoo.checkpoints.store import Publication, Store
from cnvzoo.errors import nearest
from cnvzoo.files import expanded


def publish(
    checkpoints: str | Path | Iterable[str | Path],
    to: str | Path | Store,
    *,
    hub: str | Path | None = None,
    message: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    on_published: Callable[[Publication], object] = lambda publication: None,
) -> list[Publication]:
    """Publish checkpoints to a store: weights, config and model card, in one commit each; none where nothing changed.

    Args:
        checkpoints: one or several names in `hub`, or paths of folders.
        to: a directory, or `hf://ORG` for the model repositories `ORG/<name>`. Missing repositories are created. Log in
            with `hf auth login` first.
        hub: directory of the named checkpoints; default `CNVZOO_HUB`, else the checkout's own `hub/`.
        message: commit message; default: name and accuracy.
        tag: tag to set at each commit, such as `v1`. An existing tag is never moved.
        dry_run: compare, and write nothing.
        on_published: called with each publication when it is done.

    Returns:
        For each checkpoint, which files are new, changed and unchanged, and the commit.

    Raises:
        CheckpointError: a folder is not a whole checkpoint with its card, or two folders have the same name; nothing
            was published.
        StoreError: the store refused a checkpoint; those before it are published.
    """
    if isinstance(checkpoints, (str, Path)):
        checkpoints = [checkpoints]
    folders = [_folder(checkpoint, hub) for checkpoint in checkpoints]
    _check_names(folders)
    scored = [_checked(folder) for folder in folders]  # all of them, before the first is sent
    if isinstance(to, (str, Path)):
        store = open_store(to)
    elif hasattr(to, "publish"):
        store = to
    else:
        raise StoreError(f"{to!r} is not a store: give a directory, hf://ORG or a Store")
    publications = []
    for folder, default in zip(folders, scored, strict=True):
        publications.append(store.publish(folder, message=message or default, tag=tag, dry_run=dry_run))
        on_published(publications[-1])
    return publications


def _folder(checkpoint: str | Path, hub: str | Path | None) -> Path:
    if is_path(checkpoint):
        return expanded(checkpoint)
    location = store_location(hub)
    if "://" in str(location):
        raise CheckpointError(
            f"{checkpoint} cannot be published from {printable(location)}: give a directory with hub= or CNVZOO_HUB"
        )
    root = expanded(location)
    known = checkpoint_folders(root)
    if str(checkpoint) not in known:
        choices = nearest(str(checkpoint), known) if known else "it has no checkpoints"
        choices = folder_hint(str(checkpoint)) or choices
        raise CheckpointError(f"no checkpoint {str(checkpoint)!r} in {root}: {choices}")
    return root / checkpoint


def _check_names(folders: Iterable[Path]) -> None:
    """Raise CheckpointError for two folders of one name, of which the second would replace the first in the store."""
    seen: dict[str, Path] = {}
    for folder in folders:
        whole = folder.resolve()
        first = seen.setdefault(whole.name, folder)
        if first.resolve() != whole:
            raise CheckpointError(
                f"{first} and {folder}: both would be published as {whole.name}: rename one, or publish them to two "
                "stores"
            )


def _checked(folder: Path) -> str:
    """Name and score of a checkpoint. One that is not whole, or cannot be loaded, is refused here."""
    checkpoint_files(folder)
    _, config = read_model(folder)
    score = "" if config.accuracy is None else f": {config.accuracy:.2f} % top-1 ({config.correct} of {config.total})"
    return f"{config.name}{score}"
