"""Models outside PyTorch. Running exported files needs numpy, Pillow and onnxruntime, but not torch.

The modules that write the files (`export`, `integer`, `requantize`, `writers`) import torch; call `cnvzoo.export`.
"""

from cnvzoo.deploy.metadata import DeployError, Metadata
from cnvzoo.deploy.runner import DeployedModel, Prediction, load

__all__ = ["DeployError", "DeployedModel", "Metadata", "Prediction", "load"]
