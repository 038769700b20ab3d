"""Models outside PyTorch: running exported files, which needs numpy, Pillow and onnxruntime only, never torch.

The modules that write these files (`export`, `integer`, `requantize`, `writers`) import torch; `cnvzoo.export` is their
public entrance.
"""

from cnvzoo.deploy.metadata import DeployError, Metadata
from cnvzoo.deploy.runner import DeployedModel, Prediction, load

__all__ = ["DeployError", "DeployedModel", "Metadata", "Prediction", "load"]
