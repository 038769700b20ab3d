"""Whether the published checkpoints still are what they were published as: their bytes, and their number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from cnvzoo.checkpoints.folder import preprocessing_from, read_model
from cnvzoo.checkpoints.format import CheckpointConfig
from cnvzoo.checkpoints.index import list_checkpoints
from cnvzoo.checkpoints.locations import find_checkpoint
from cnvzoo.data.datasets import Dataset, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.training.device import describe_device, keep_freed_memory, resolve_device
from cnvzoo.training.evaluation import evaluate

ELSEWHERE = 5  # images: kernels of other machines and versions round otherwise, and a few images sit on the edge


@dataclass(frozen=True)
class Verification:
    """What became of one checkpoint.

    Attributes:
        name: of the checkpoint, or the path it was given by.
        published, found: test images classified right, in its config and here; None where it did not come to that.
        total: test images.
        allowed: by how many the two may differ: 0 on the kind of machine that published it, `ELSEWHERE` on others.
        problem: what is wrong, or None.
    """

    name: str
    published: int | None = None
    found: int | None = None
    total: int | None = None
    allowed: int = 0
    problem: str | None = None


@keep_freed_memory()  # or most of the time goes to page faults
def verify(
    checkpoints: Iterable[str | Path] | None = None,
    *,
    hub: str | Path | None = None,
    device: str | torch.device = "auto",
    data_root: str | Path | None = None,
) -> list[Verification]:
    """Compare every file of checkpoints with the index, score them on their test sets, and compare with their numbers.

    The number of images classified right has to be the published one on the kind of machine that published it (same
    device or processor and instruction set, same version of torch), and within `ELSEWHERE` images of it on another.

    Args:
        checkpoints: names, or paths of folders; None: all that are published.
        hub: where names are looked for, see `cnvzoo.load_checkpoint`.
        device: `auto`, or anything torch.device takes.
        data_root: where datasets are cached.

    Returns:
        One for each, in order; what is wrong with a checkpoint is said in its `problem`, not raised.
    """
    if checkpoints is None:
        checkpoints = [found["name"] for found in list_checkpoints()]
    target, datasets = resolve_device(device), {}
    return [_verify(checkpoint, hub, target, data_root, datasets) for checkpoint in checkpoints]


def _verify(
    checkpoint: str | Path,
    hub: str | Path | None,
    device: torch.device,
    data_root: str | Path | None,
    datasets: dict[str, Dataset],
) -> Verification:
    name = str(checkpoint)
    try:
        located = find_checkpoint(checkpoint, hub, every_file=True)
        model, config = read_model(located.folder, located.files)
        if config.dataset not in datasets:
            datasets[config.dataset] = load_dataset(config.dataset, root=data_root)
        data, preprocessing = datasets[config.dataset], preprocessing_from(config)
        ours = _images(preprocessing.native_size, preprocessing.in_chans, len(config.classes))
        theirs = _images(data.info.image_size, data.info.in_chans, data.info.num_classes)
        if ours != theirs:
            return Verification(name, problem=f"its config is for {ours}, and {data.info.name} has {theirs}")
        result = evaluate(model, data, preprocessing=preprocessing, device=device)
    except CnvzooError as error:
        return Verification(name, problem=str(error))
    allowed = 0 if is_kind_of_machine(config, device) else ELSEWHERE
    problem = None
    if result.total != config.total:
        problem = f"published on {config.total:,} images, and the test set has {result.total:,}"
    elif abs(result.correct - config.correct) > allowed:
        problem = f"{result.correct:,} images right, published {config.correct:,}, allowed difference {allowed}"
    return Verification(name, config.correct, result.correct, config.total, allowed, problem)


def _images(side: int, channels: int, classes: int) -> str:
    return f"images of {side}x{side} pixels, {channels} channel(s) and {classes} classes"


def is_kind_of_machine(config: CheckpointConfig, device: torch.device) -> bool:
    """Whether `device` and this torch are of the kind that published the checkpoint, so that its bits are expected."""
    here = describe_device(device)
    same = all(here.get(key) == config.device.get(key) for key in ("kind", "name", "capability"))
    return same and config.versions.get("torch") == str(torch.__version__)
