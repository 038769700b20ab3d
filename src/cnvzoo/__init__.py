"""cnvzoo: small image classifiers, float and quantized, with proven weights and the recipes that give them.

The public names are imported when the first of them is used: `cnvzoo.deploy` runs exported models where there is no
PyTorch, and importing it imports this module too.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnvzoo.data import list_datasets, load_dataset
    from cnvzoo.deployment import export
    from cnvzoo.errors import CnvzooError
    from cnvzoo.hub import list_checkpoints, load_checkpoint
    from cnvzoo.models import quantize_bias, register_model
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
    "export",
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
    "quantize_bias",
    "register_model",
    "train",
    "transforms",
    "verify",
    "write_card",
]


def _import_public_names() -> None:
    from cnvzoo.collection import without_collection

    with without_collection():
        from cnvzoo import data, deployment, errors, hub, models, publishing, zoo
        from cnvzoo.train import Recipe, load_recipe
        from cnvzoo.verify import verify
    found = {"Recipe": Recipe, "load_recipe": load_recipe, "verify": verify, "export": deployment.export}
    for name in __all__:
        if name not in found:
            found[name] = next(
                getattr(m, name) for m in (zoo, hub, publishing, data, models, errors) if hasattr(m, name)
            )
    globals().update(found)


class _Package(ModuleType):
    """This package. `train` and `verify` are functions of it and modules in it: the function has the name."""

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            _import_public_names()
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):  # as importing a submodule would
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
