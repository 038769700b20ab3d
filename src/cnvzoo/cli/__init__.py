"""The command line: each command is one call of the library.

Modules that import PyTorch are imported inside the commands that need them, so that `cnvzoo --help`, `cnvzoo --version`
and `cnvzoo list --checkpoints` answer at once.
"""

# isort: off
import cnvzoo.cli.listing  # in the order of --help
import cnvzoo.cli.training
import cnvzoo.cli.checkpoints  # noqa: F401
# isort: on

from cnvzoo.cli.app import main

__all__ = ["main"]
