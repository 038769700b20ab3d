"""Architectures. Importing this package registers them all; Brevitas loads when a quantized model is built."""

from cnvzoo.models import cnv, mobilenet, resnet  # noqa: F401  (each registers its models)
from cnvzoo.models.registry import (
    ModelInfo,
    ModelSpec,
    build_model,
    model_info,
    model_names,
    model_spec,
    register_model,
)

__all__ = ["ModelInfo", "ModelSpec", "build_model", "model_info", "model_names", "model_spec", "register_model"]
