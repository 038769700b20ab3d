"""Models outside PyTorch: running exported files, which needs numpy and onnxruntime only, never torch.

What makes the files is beside this, in modules that import torch: `cnvzoo.export` is their entrance.
"""

from .errors import DeployError
from .metadata import Metadata
from .runner import DeployedModel, Prediction, load

__all__ = ["DeployError", "DeployedModel", "Metadata", "Prediction", "load"]
