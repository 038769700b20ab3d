"""The command line: each command is one call of the library.

Modules that import PyTorch are imported inside the commands that need them, so that `cnvzoo --help`, `cnvzoo --version`
and `cnvzoo list --checkpoints` answer at once.
"""

import cnvzoo.cli.listing
import cnvzoo.cli.commands  # noqa: I001  (the order of the commands in --help)
from cnvzoo.cli.app import main

__all__ = ["main"]
