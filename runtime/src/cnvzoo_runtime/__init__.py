"""Run models that cnvzoo exported, with numpy, Pillow and ONNX Runtime, without PyTorch and without cnvzoo.

`load(path)` returns a `DeployedModel`, whose `predict` takes images of any size. Public names are imported when they
are first used: cnvzoo imports its base class of errors from this package, and numpy and Pillow would slow its start.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnvzoo_runtime.deployed_model import DeployedModel, Prediction, load, read_metadata
    from cnvzoo_runtime.errors import CnvzooError
    from cnvzoo_runtime.images import ImageError, normalize, prepare, read_image
    from cnvzoo_runtime.metadata import DeployError, Metadata

try:
    __version__ = version("cnvzoo-runtime")
except PackageNotFoundError:  # a checkout that is not installed, as torch.hub uses it
    __version__ = "0+unknown"

__all__ = [
    "CnvzooError",
    "DeployError",
    "DeployedModel",
    "ImageError",
    "Metadata",
    "Prediction",
    "load",
    "normalize",
    "prepare",
    "read_image",
    "read_metadata",
]

_MODULES = {  # with the public names that each defines
    "errors": ("CnvzooError",),
    "images": ("ImageError", "normalize", "prepare", "read_image"),
    "metadata": ("DeployError", "Metadata"),
    "deployed_model": ("DeployedModel", "Prediction", "load", "read_metadata"),
}
_DEFINED_IN = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
