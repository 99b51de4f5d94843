"""The run directory: one process at a time, atomic checkpoints, what resume starts from.

A checkpoint is written beside the others under a temporary name, described by a manifest (size
and SHA-256 of every file), flushed to disk and only then renamed: whenever the process dies, each
directory named ``step_...`` is whole. A checkpoint that does not match its manifest is refused
and the one before it is used, loudly.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

MANIFEST = "manifest.json"


class RunLock:
    """Holds a run directory for one process; the lock dies with the process."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise RuntimeError(
                f"{self._path.parent} is in use by another rlhf process (pid {owner}): wait for "
                "it, or set another run_dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole, verified checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]


class CheckpointStore:
    """Checkpoints of one training run, in ``directory/step_000010``."""

    def __init__(self, directory: Path, keep: int, warn: Callable[[str], None] = print) -> None:
        self._directory = directory
        self._keep = keep
        self._warn = warn

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Write one checkpoint; ``write(directory)`` puts the large files into it.

        Raises:
            OSError: The disk is full or read-only. The checkpoints before are untouched.
        """
        final = self._directory / f"step_{step:06d}"
        partial = self._directory / f".step_{step:06d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write(partial)
            _write_json(partial / "state.json", {"step": step, **state})
            _write_json(partial / MANIFEST, {"files": _describe(partial)})
            for file in partial.rglob("*"):
                _flush(file)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _flush(self._directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = max(self.steps(), default=None)
            raise OSError(
                error.errno,
                f"could not write the checkpoint of step {step} to {self._directory} "
                f"({error.strerror}): free disk space and run again with --resume; last good "
                f"checkpoint: {'none' if last is None else f'step {last}'}",
            ) from error
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._directory / f"step_{old:06d}")
        return final

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        return sorted(
            int(path.name.removeprefix("step_"))
            for path in self._directory.glob("step_*")
            if path.name.removeprefix("step_").isdigit()
        )

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that matches its manifest, or ``None`` when there is none.

        Raises:
            RuntimeError: There are checkpoints and every one of them is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self._directory / f"step_{step:06d}"
            problem = verify(path)
            if problem is None:
                state = json.loads((path / "state.json").read_text(encoding="utf-8"))
                return Checkpoint(path=path, step=step, state=state)
            self._warn(f"checkpoint {path} is damaged ({problem}): trying the one before it")
        if steps:
            raise RuntimeError(
                f"every checkpoint in {self._directory} is damaged: restore one from a backup, or "
                "start the run anew without --resume"
            )
        return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or ``None``."""
    try:
        expected = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    for name, entry in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} does not match its checksum"
    return None


def _describe(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        file.relative_to(directory).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
