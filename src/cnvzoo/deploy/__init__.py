"""Models outside PyTorch. Running exported files needs numpy, Pillow and onnxruntime, but not torch.

What runs the files is the package cnvzoo_runtime, which can be installed without cnvzoo; its names are here too. The
other modules write the files; call `cnvzoo.export`.
"""

from cnvzoo_runtime import DeployedModel, DeployError, ImageError, Metadata, Prediction, load

__all__ = ["DeployError", "DeployedModel", "ImageError", "Metadata", "Prediction", "load"]
