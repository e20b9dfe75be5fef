"""SIGTERM and SIGINT ask the loop to stop; the loop saves and leaves with exit code 75. A second signal ends at once.

Why a flag: a handler that saves by itself would run between any two bytecodes, in the middle of an optimizer step. The loop
looks at the flag between microbatches and drops an unfinished window, which costs at most one step and loses nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def guard() -> Iterator[Stop]:
    """While inside, signals set the flag; on leaving, the handlers from before are back. A no-op outside the main thread."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop:
            os._exit(128 + number)
        stop.signal = signal.Signals(number)
        os.write(2, f"\n{stop.signal.name}: saving and stopping; once more ends at once\n".encode())

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
