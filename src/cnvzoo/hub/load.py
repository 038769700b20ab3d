"""From a checkpoint's name or path to its model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from cnvzoo.collection import without_collection

from .adapt import adapt
from .checkpoint import CheckpointConfig, read_model
from .locate import find_checkpoint


def load_checkpoint(
    checkpoint: str | Path,
    *,
    hub: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
) -> tuple[nn.Module, CheckpointConfig]:
    """Build the model of a checkpoint, in eval mode on the CPU, with its weights.

    Size and sha256 of a file are compared before anything in it is read: with the index inside this package, or, for a
    checkpoint that is not a published one, with its own config.json.

    Args:
        checkpoint: a name, such as `cnv.mnist`; or the path of a folder, as a Path or with a separator in it.
        hub: where names are looked for: a directory or `hf://ORGANISATION`; default `CNVZOO_HUB`, else the checkout's
            own `hub/`, else the Hub.
        num_classes: where it is not the checkpoint's, the head is a new one, to be trained; a warning says so.
        in_chans: where it is not the checkpoint's, the first convolution is adapted; a warning says so.

    Returns:
        The model, and what is known of it, which is also the model's `pretrained_cfg`.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors are not exactly the model's; all are named.
    """
    with without_collection():  # the first quantized model imports Brevitas
        located = find_checkpoint(checkpoint, hub)
        model, config = read_model(located.folder, located.files)
    wanted = {"num_classes": num_classes, "in_chans": in_chans}
    changes = {key: value for key, value in wanted.items() if value is not None and value != config.model[key]}
    if changes:
        model = adapt(model, config.model, changes, config.name)
    model.pretrained_cfg = config  # type: ignore[assignment]  (how it is to be fed can be asked of it)
    return model, config
