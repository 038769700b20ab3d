"""Verifying checkpoints: the bytes of their files, and their accuracy on the test set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from cnvzoo.checkpoints.folder import preprocessing_from, read_model
from cnvzoo.checkpoints.format import CheckpointConfig
from cnvzoo.checkpoints.index import list_checkpoints
from cnvzoo.checkpoints.locations import check_exists, find_checkpoint
from cnvzoo.checkpoints.test_set import load_test_set
from cnvzoo.data.datasets import Dataset, is_dataset_path, load_dataset
from cnvzoo.data.published import list_datasets
from cnvzoo.errors import CnvzooError, DatasetError, in_a_line
from cnvzoo.files import expanded
from cnvzoo.training.device import describe_device, keep_freed_memory, resolve_device
from cnvzoo.training.evaluation import evaluate

ALLOWED_ELSEWHERE = 5  # images; kernels of other machines and versions round differently


@dataclass(frozen=True)
class Verification:
    """The result of verifying one checkpoint.

    Attributes:
        name: name of the checkpoint, or its path as it was given.
        published, found: correctly classified test images, in its config and here; None where it was not scored.
        total: number of test images.
        allowed: allowed difference of the two: 0 on the kind of machine that published it, else `ALLOWED_ELSEWHERE`.
        problem: what is wrong, or None.
        missing_data: whether the problem is that the test set cannot be loaded, so that only files were compared.
    """

    name: str
    published: int | None = None
    found: int | None = None
    total: int | None = None
    allowed: int = 0
    problem: str | None = None
    missing_data: bool = False


@keep_freed_memory()  # otherwise most of the time goes to page faults
def verify(
    checkpoints: str | Path | Iterable[str | Path] | None = None,
    *,
    hub: str | Path | None = None,
    device: str | torch.device = "auto",
    data_root: str | Path | None = None,
    dataset: str | Path | Dataset | None = None,
) -> list[Verification]:
    """Compare every file of checkpoints with the index, then their accuracy on the test set with the published one.

    On the kind of machine that published a checkpoint (same device or processor and instruction set, same version of
    torch) the number of correct images must be the same, elsewhere it may differ by `ALLOWED_ELSEWHERE` images.

    A checkpoint that is given by its path, or is not published, is compared with its own config.json instead of the
    index, also where its name is that of a published one: its weights with the sha256 there, its accuracy with the
    number there. That shows damage, and not whether these are the published files.

    Args:
        checkpoints: one or several names, or paths of folders; None for all published ones.
        hub: the store of named checkpoints, see `cnvzoo.load_checkpoint`.
        device: `auto`, or anything that torch.device takes.
        data_root: folder of the cached datasets.
        dataset: the dataset of checkpoints that were trained on own images, as for `cnvzoo.load_dataset`; images of a
            folder are resized to what each checkpoint takes. Without it, only the files of these are compared.

    Returns:
        One result for each, in order. A problem of a checkpoint is returned, not raised.

    Raises:
        CheckpointError: a name is of no checkpoint, or a folder does not exist; nothing was verified.
        DatasetError: `dataset` cannot be loaded.
        CnvzooError: the device is not available.
    """
    if checkpoints is None:
        checkpoints = [found["name"] for found in list_checkpoints()]
    checkpoints = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    for checkpoint in checkpoints:
        check_exists(checkpoint, hub)
    target, loaded, missing = resolve_device(device), {}, {}
    if dataset is not None and not isinstance(dataset, Dataset) and not _is_folder(dataset):
        dataset = load_dataset(dataset, root=data_root)
    return [_verify(checkpoint, hub, target, data_root, loaded, missing, dataset) for checkpoint in checkpoints]


def _is_folder(dataset: str | Path) -> bool:
    return is_dataset_path(dataset) and expanded(dataset).is_dir()


def _verify(
    checkpoint: str | Path,
    hub: str | Path | None,
    device: torch.device,
    data_root: str | Path | None,
    loaded: dict[tuple[str | None, int, int], Dataset],
    missing: dict[str, DatasetError],
    own: str | Path | Dataset | None,
) -> Verification:
    name = str(checkpoint)
    try:
        local = find_checkpoint(checkpoint, hub, every_file=True)
        model, config = read_model(local.folder, local.files)
        source = config.dataset if config.dataset in list_datasets() else own
        if source is None:
            return Verification(name, published=config.correct, total=config.total)
        preprocessing = preprocessing_from(config)
        side, channels = preprocessing.native_size, preprocessing.in_chans
        named = None if source is own else config.dataset
        key = (named, side, channels)
        try:
            if named in missing:  # trying again would take as long, and fail again
                raise missing[named]
            loaded[key] = data = load_test_set(
                loaded.get(key, source), "its config", image_size=side, in_chans=channels, classes=config.classes,
                data_root=data_root,
            )  # fmt: skip
        except DatasetError as error:
            if named is not None:
                missing[named] = error
            return Verification(name, config.correct, None, config.total, problem=in_a_line(error), missing_data=True)
        try:
            result = evaluate(model, data, preprocessing=preprocessing, device=device)
        except CnvzooError:
            raise
        except Exception as error:  # the model may be the user's own
            problem = f"evaluating it failed: {in_a_line(error)}"
            return Verification(name, config.correct, None, config.total, problem=problem)
    except CnvzooError as error:
        return Verification(name, problem=in_a_line(error))
    if config.correct is None or config.total is None:
        return Verification(name, None, result.correct, result.total)
    allowed = 0 if is_kind_of_machine(config, device) else ALLOWED_ELSEWHERE
    problem = None
    if result.total != config.total:
        problem = f"published on {config.total:,} images, and the test set has {result.total:,}"
    elif abs(result.correct - config.correct) > allowed:
        problem = f"{result.correct:,} correct images, published {config.correct:,}, allowed difference {allowed}"
    return Verification(name, config.correct, result.correct, config.total, allowed, problem)


def is_kind_of_machine(config: CheckpointConfig, device: torch.device) -> bool:
    """Whether `device` and this torch are of the kind that published the checkpoint, so that all bits must agree."""
    here = describe_device(device)
    same = all(here.get(key) == config.device.get(key) for key in ("kind", "name", "capability"))
    return same and config.versions.get("torch") == str(torch.__version__)
