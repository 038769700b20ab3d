"""What goes wrong with checkpoints."""

from __future__ import annotations

from cnvzoo.errors import CnvzooError


class CheckpointError(CnvzooError):
    """A checkpoint that is missing, damaged or does not fit: names the file and what was expected."""
