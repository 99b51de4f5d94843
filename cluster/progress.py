"""Progress a person can follow: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_SECONDS = 15.0


class Bar(Protocol):
    """One piece of work of known size. Obtained from :meth:`Reporter.bar`."""

    def update(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Report that ``done`` of ``total`` is finished, with the figures worth watching."""


class _TerminalBar:
    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, figures="")

    def update(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=done, total=total, figures=figures(metrics))


class _LogBar:
    """Prints a line at most every 15 s, and for the last unit of work."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._started = self._printed = time.monotonic()

    def update(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._printed < LOG_SECONDS and done < total:
            return
        self._printed = now
        elapsed = now - self._started
        left = elapsed / max(done, 1) * (total - done)
        self._console.print(
            f"{self._title}: {done}/{total}, {elapsed:.0f} s, {left:.0f} s left  "
            f"{figures(metrics)}",
            highlight=False,
        )


class Reporter:
    """Where a run says what it is doing. Standard error, so that output can be piped."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def heading(self, text: str) -> None:
        self._console.print(f"\n[bold]{text}[/bold]")

    def warn(self, text: str) -> None:
        self._console.print("[yellow]warning:[/yellow]", end=" ")
        self._console.print(text, markup=False)

    @contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        """A progress bar with rate and remaining time; lines when there is no terminal."""
        if not self._console.is_terminal:
            yield _LogBar(self._console, title)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            yield _TerminalBar(progress, title)


def figures(metrics: Mapping[str, float]) -> str:
    """``loss 1.23  lr 0.001``: short enough for one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
