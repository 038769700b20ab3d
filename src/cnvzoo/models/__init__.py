"""Architectures. Importing this package registers them all; Brevitas loads when a quantized model is built."""

from . import cnv, mobilenet, resnet  # noqa: F401  (each registers its models)
from .integer_bias import quantize_bias
from .registry import ModelSpec, build_model, model_names, model_spec, register_model

__all__ = ["ModelSpec", "build_model", "model_names", "model_spec", "quantize_bias", "register_model"]
