"""cnvzoo: small image classifiers, float and quantized, with recipes, records of runs, and weights.

Public names are imported when they are first used (PEP 562): `cnvzoo.deploy` runs exported models on machines without
PyTorch, and the command line lists checkpoints without importing it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnvzoo.checkpoints.format import CheckpointConfig, CheckpointError, StoreError
    from cnvzoo.checkpoints.index import CheckpointInfo, list_checkpoints
    from cnvzoo.checkpoints.load import load_checkpoint
    from cnvzoo.checkpoints.publish import publish
    from cnvzoo.checkpoints.save import write_card
    from cnvzoo.checkpoints.store import Publication
    from cnvzoo.checkpoints.verify import Verification, verify
    from cnvzoo.data.datasets import Dataset, load_dataset
    from cnvzoo.data.preprocessing import Preprocessing
    from cnvzoo.data.published import DatasetInfo, list_datasets
    from cnvzoo.deploy import ImageError, Metadata, Prediction
    from cnvzoo.deploy.export import export
    from cnvzoo.errors import CnvzooError, DatasetError, ModelError
    from cnvzoo.files import FileError
    from cnvzoo.inference import predict, transforms
    from cnvzoo.models.classifier import Classifier
    from cnvzoo.models.integers import IntegerWeight, integer_weights, quantize_bias
    from cnvzoo.models.registry import ModelInfo, model_info, register_model, unregister_model
    from cnvzoo.recipe_folder import list_recipes
    from cnvzoo.train_and_save import TrainResult, save_checkpoint, train
    from cnvzoo.training.evaluation import Evaluation, evaluate
    from cnvzoo.training.recipe import Recipe
    from cnvzoo.training.recipe_file import load_recipe
    from cnvzoo.training.record import RunRecord
    from cnvzoo.training.watch import EpochReport
    from cnvzoo.zoo import create_model, list_models, quantize

try:
    __version__ = version("cnvzoo")
except PackageNotFoundError:  # a checkout that is not installed, as torch.hub uses it
    __version__ = "0+unknown"

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointInfo",
    "Classifier",
    "CnvzooError",
    "Dataset",
    "DatasetError",
    "DatasetInfo",
    "EpochReport",
    "Evaluation",
    "FileError",
    "ImageError",
    "IntegerWeight",
    "Metadata",
    "ModelError",
    "ModelInfo",
    "Prediction",
    "Preprocessing",
    "Publication",
    "Recipe",
    "RunRecord",
    "StoreError",
    "TrainResult",
    "Verification",
    "create_model",
    "evaluate",
    "export",
    "integer_weights",
    "list_checkpoints",
    "list_datasets",
    "list_models",
    "list_recipes",
    "load_checkpoint",
    "load_dataset",
    "load_recipe",
    "model_info",
    "predict",
    "publish",
    "quantize",
    "quantize_bias",
    "register_model",
    "save_checkpoint",
    "train",
    "transforms",
    "unregister_model",
    "verify",
    "write_card",
]

_MODULES = {  # with the public names that each defines
    "checkpoints.format": (
        "CheckpointConfig",
        "CheckpointError",
        "StoreError",
    ),
    "checkpoints.index": (
        "CheckpointInfo",
        "list_checkpoints",
    ),
    "checkpoints.load": ("load_checkpoint",),
    "checkpoints.publish": ("publish",),
    "checkpoints.save": ("write_card",),
    "checkpoints.store": ("Publication",),
    "checkpoints.verify": (
        "Verification",
        "verify",
    ),
    "data.datasets": (
        "Dataset",
        "load_dataset",
    ),
    "data.preprocessing": ("Preprocessing",),
    "data.published": (
        "DatasetInfo",
        "list_datasets",
    ),
    "deploy": (
        "ImageError",
        "Metadata",
        "Prediction",
    ),
    "deploy.export": ("export",),
    "errors": (
        "CnvzooError",
        "DatasetError",
        "ModelError",
    ),
    "files": ("FileError",),
    "inference": (
        "predict",
        "transforms",
    ),
    "models.classifier": ("Classifier",),
    "models.integers": (
        "IntegerWeight",
        "integer_weights",
        "quantize_bias",
    ),
    "models.registry": (
        "ModelInfo",
        "model_info",
        "register_model",
        "unregister_model",
    ),
    "recipe_folder": ("list_recipes",),
    "train_and_save": (
        "TrainResult",
        "save_checkpoint",
        "train",
    ),
    "training.evaluation": (
        "Evaluation",
        "evaluate",
    ),
    "training.recipe": ("Recipe",),
    "training.recipe_file": ("load_recipe",),
    "training.record": ("RunRecord",),
    "training.watch": ("EpochReport",),
    "zoo": (
        "create_model",
        "list_models",
        "quantize",
    ),
}
_SUBPACKAGES = ("data", "deploy", "training")  # with public names of their own
_DEFINED_IN = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
