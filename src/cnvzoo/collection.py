"""Python's cyclic garbage collector, left out where everything that is made stays.

Importing makes hundreds of thousands of objects, none of them garbage, and Python walks through all that there are
again and again meanwhile: a fifth of the time that importing torch takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No cyclic garbage collection inside; afterwards it is as before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
