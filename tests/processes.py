"""Processes that a test has started, whoever their parent is by now and however they end
meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import psutil


def marked(variable: str, value: str) -> Iterator[psutil.Process]:
    """Every living process that has that variable in its environment."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.status() != "zombie":
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def title(process: psutil.Process) -> str:
    """Its command line, which Ray makes the name of the actor; nothing once it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie is one that is not there
        return ""
