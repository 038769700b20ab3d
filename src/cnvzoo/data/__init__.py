"""Datasets, preprocessing and training batches. Knows nothing of models."""

from cnvzoo.data.augmentation import Augmentation
from cnvzoo.data.batches import TrainBatches
from cnvzoo.data.datasets import Dataset, load_dataset
from cnvzoo.data.preprocessing import Preprocessing, transforms
from cnvzoo.data.published import DatasetInfo, dataset_info, list_datasets, published_sha256
from cnvzoo.errors import DatasetError

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
