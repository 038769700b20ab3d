"""SIGINT and SIGTERM as a request to stop at the next step, in place of a traceback in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def caught_signals(second: Any = None) -> Iterator[list[str]]:
    """Collect the names of SIGINT and SIGTERM as they come; a second one of a kind acts as ever, or by `second`.

    Outside the main thread, where Python handles no signals, the list stays empty.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {}

    def handler(number: int, _frame: object) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[number] if second is None else second)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
