"""Datasets, preprocessing and training batches. Knows nothing of models."""

from cnvzoo.data.augmentation import Augmentation
from cnvzoo.data.batches import TrainBatches
from cnvzoo.data.datasets import (
    Dataset,
    DatasetError,
    DatasetInfo,
    dataset_info,
    list_datasets,
    load_dataset,
    published_sha256,
)
from cnvzoo.data.preprocessing import Preprocessing, transforms

__all__ = [
    "Augmentation",
    "Dataset",
    "DatasetError",
    "DatasetInfo",
    "Preprocessing",
    "TrainBatches",
    "dataset_info",
    "list_datasets",
    "load_dataset",
    "published_sha256",
    "transforms",
]
