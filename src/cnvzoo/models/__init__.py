"""Architectures. Importing this package registers all of them; building a quantized one imports Brevitas."""

from cnvzoo.models import cnv, mobilenet, resnet  # noqa: F401  (each registers its models)
from cnvzoo.models.classifier import Classifier
from cnvzoo.models.registry import (
    ModelInfo,
    ModelSpec,
    build_model,
    model_info,
    model_names,
    model_spec,
    register_model,
    unregister_model,
)

__all__ = [
    "Classifier",
    "ModelInfo",
    "ModelSpec",
    "build_model",
    "model_info",
    "model_names",
    "model_spec",
    "register_model",
    "unregister_model",
]
