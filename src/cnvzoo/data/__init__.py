"""Datasets, preprocessing and training batches. Knows nothing of models."""

from __future__ import annotations

from cnvzoo.data.augment import Augmentation
from cnvzoo.data.batches import TrainBatches
from cnvzoo.data.cache import DatasetError
from cnvzoo.data.datasets import Dataset, DatasetInfo, dataset_info, list_datasets, load_dataset, published_sha256
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
