"""Models outside PyTorch. Running exported files needs numpy, Pillow and onnxruntime, but not torch.

What runs the files is the package cnvzoo_runtime, which can be installed without cnvzoo; its names are here too. The
modules that write the files (`export`, `integer`, `requantize`, `writers`) import torch; call `cnvzoo.export`.
"""

from cnvzoo_runtime import DeployedModel, DeployError, Metadata, Prediction, load

__all__ = ["DeployError", "DeployedModel", "Metadata", "Prediction", "load"]
