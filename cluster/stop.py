"""Ctrl-C and SIGTERM: finish what is in hand, save, and end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """The run ended early because somebody asked; everything done so far is saved."""


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the second Ctrl-C interrupts at once.

    Call :meth:`install` after ``ray.init``, which puts a SIGTERM handler of its own.
    """

    def __init__(
        self, notify: Callable[[str], None] = print, what: str = "saving what is done"
    ) -> None:
        """``what`` is said to happen before the end."""
        self._asked = threading.Event()
        self._notify = notify
        self._what = what

    def __call__(self) -> bool:
        return self._asked.is_set()

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.set()
        self._notify(f"stopping: {self._what} (press Ctrl-C again to stop at once)")
