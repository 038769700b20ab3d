"""The one error that the harness raises for people; `reproduce.py` prints it and exits with status 2."""

from __future__ import annotations

from cnvzoo.errors import CnvzooError


class HarnessError(CnvzooError):
    """A recipe folder, reference file, record or request that cannot be worked with; the message has the remedy."""
