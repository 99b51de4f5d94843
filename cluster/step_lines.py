"""JSON lines that belong to steps: appended while a run goes on, cut back when it resumes.

``metrics.jsonl`` and ``quarantine.jsonl`` are such files. Every line is a JSON object with an
integer ``step``. A run that resumes after step N keeps the lines up to N, in one atomic
replacement, and does the later steps again: no line is there twice and none is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn


class StepLines:
    """One such file, open for appending.

    Args:
        path: The file; its directory is made when missing.
        resume_step: The step that a resumed run continues after: lines of later steps are cut,
            and so is a line that a killed run left unfinished. ``None`` starts the file anew.

    Raises:
        ValueError: A line that is to be kept is not one of ours.
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_after(path, resume_step)
        # Unbuffered: what append() has returned from survives the end of this process.
        self._file = path.open("ab", buffering=0)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append all rows, or none when there is no room for them.

        Raises:
            OSError: The disk is full or broken; the file ends where it ended before.
        """
        data = b"".join(_line(row) for row in rows)
        before = self._file.tell()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise OSError(
                error.errno,
                f"could not append to {self.path} ({error.strerror}): free disk space and run "
                "again with --resume",
            ) from error

    def sync(self) -> None:
        """Have the disk hold what was appended: a checkpoint that follows relies on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_step_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines of a file and, when its last one was left out, the sentence that says so.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than an unfinished last one is not a JSON object with a step;
            the message has the file and the line's number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a stage writes it when it runs")
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    unfinished = lines.pop()  # what follows the last newline: nothing, or an unfinished line
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_parse(path, number, line))
    if not unfinished.strip():
        return rows, ""
    try:
        rows.append(_parse(path, len(lines) + 1, unfinished))
    except ValueError:
        return rows, (
            f"{path}:{len(lines) + 1}: the last line is cut off (the run was killed while writing "
            "it) and is left out"
        )
    return rows, ""


def _line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate, which a broken tokenizer may decode to, has no UTF-8.
    text = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace")


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not strict JSON")

    try:
        row = json.loads(line, parse_constant=refuse_constant)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not a line of {path.stem}: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(
            f"{path}:{number}: not a line of {path.stem}: expected a JSON object with an integer "
            "'step'"
        )
    return row


def _cut_after(path: Path, step: int | None) -> None:
    """Leaves in ``path`` only the lines up to ``step``, in one atomic replacement."""
    if step is None or not path.exists():
        path.unlink(missing_ok=True)
        return
    rows, _ = read_step_lines(path)
    temporary = path.with_suffix(".jsonl.partial")
    with temporary.open("wb") as file:
        for row in rows:
            if row["step"] <= step:
                file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
