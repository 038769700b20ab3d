"""The images that a saved model is scored on: those of a dataset, as the model takes them, with its classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cnvzoo.data.datasets import Dataset, is_dataset_path, load_dataset
from cnvzoo.data.published import DatasetInfo, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.files import expanded
from cnvzoo.training.evaluation import check_class_names


def load_test_set(
    source: str | Path | Dataset,
    model: str,
    *,
    image_size: int,
    in_chans: int,
    classes: Sequence[str],
    data_root: str | Path | None = None,
) -> Dataset:
    """The dataset to score a model on, after a check that its images and classes are those of the model.

    Images of a folder are resized and converted to what the model takes. The names of a user's own classes have to be
    the model's, in its order, where both have other names than "0", "1", and so on.

    Args:
        source: name of a dataset or path of own images, as for `load_dataset`, or a loaded one.
        model: name of the model, for the message.
        image_size: side of the images that the model takes, in pixels, before they are padded.
        in_chans: channels of the images that it takes.
        classes: names of its classes.
        data_root: folder of the cached datasets.

    Raises:
        ModelError: the dataset has other images or classes; one of the benchmark is not loaded then.
        DatasetError: as `load_dataset`.
    """

    def check(info: DatasetInfo) -> None:
        expected = _images(image_size, in_chans, len(classes))
        found = _images(info.image_size, info.in_chans, info.num_classes)
        if expected != found:
            raise ModelError(f"{model} is for {expected}, and {info.name} has {found}")
        check_class_names(model, classes, info)

    if isinstance(source, Dataset):
        data = source
    elif not is_dataset_path(source):
        check(dataset_info(str(source)))
        data = load_dataset(source, root=data_root)
    elif expanded(source).is_dir():
        data = load_dataset(source, size=image_size, in_chans=in_chans)
    else:
        data = load_dataset(source)
    check(data.info)
    return data


def _images(side: int, channels: int, classes: int) -> str:
    return f"images of {side}x{side} pixels, {channels} channel(s) and {classes} classes"
