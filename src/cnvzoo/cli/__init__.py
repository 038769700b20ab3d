"""The command line: each command is one call of the library.

Modules that import PyTorch are imported inside the commands that need them, so that `cnvzoo --help`, `cnvzoo --version`
and `cnvzoo list --checkpoints` answer at once.
"""

import cnvzoo.cli.listing  # the first commands in --help

# isort: split
import cnvzoo.cli.commands  # noqa: F401
from cnvzoo.cli.app import main

__all__ = ["main"]
