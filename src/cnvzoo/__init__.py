"""cnvzoo: small image classifiers, float and quantized, with proven weights and the recipes that give them."""

from importlib.metadata import PackageNotFoundError, version

from cnvzoo.collection import without_collection

with without_collection():
    from cnvzoo.data import list_datasets, load_dataset
    from cnvzoo.errors import CnvzooError
    from cnvzoo.hub import list_checkpoints, load_checkpoint
    from cnvzoo.models import register_model
    from cnvzoo.publishing import publish, write_card
    from cnvzoo.train import Recipe, load_recipe
    from cnvzoo.verify import verify
    from cnvzoo.zoo import create_model, evaluate, list_models, model_info, predict, quantize, train, transforms

try:
    __version__ = version("cnvzoo")
except PackageNotFoundError:  # a checkout that is not installed, as torch.hub uses it
    __version__ = "0+unknown"

__all__ = [
    "CnvzooError",
    "Recipe",
    "create_model",
    "evaluate",
    "list_checkpoints",
    "list_datasets",
    "list_models",
    "load_checkpoint",
    "load_dataset",
    "load_recipe",
    "model_info",
    "predict",
    "publish",
    "quantize",
    "register_model",
    "train",
    "transforms",
    "verify",
    "write_card",
]
