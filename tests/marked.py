"""Processes that a test has started, found by what it put into their environment: whoever their
parent is by now."""

from __future__ import annotations

from collections.abc import Iterator

import psutil


def marked(variable: str, value: str) -> Iterator[psutil.Process]:
    """Every living process with that variable."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.status() != "zombie":
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
