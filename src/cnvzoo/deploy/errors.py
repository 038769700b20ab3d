"""What goes wrong where a model leaves PyTorch, or a file is run."""

from __future__ import annotations

from cnvzoo.errors import CnvzooError


class DeployError(CnvzooError, ValueError):
    """A model that the format cannot express, a file that is not ours, or images that a file cannot take."""
