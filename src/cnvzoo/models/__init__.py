"""Topologies. Importing this package registers all of them; building a quantized one imports Brevitas."""

import logging

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

# Brevitas and Inductor import a module of torch that they use for nothing here, and that warns of a missing GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
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
