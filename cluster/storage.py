"""A copy of the run directory at a URL: what a node that disappears takes with it comes back.

The run directory stays on a disk. After each checkpoint and each stage, what is new in it is copied
to ``cluster.storage`` (``s3://``, ``gs://``, ``file://``, whatever pyarrow or fsspec opens), and a
run that starts with less than lies there fetches it first. A copy may break off anywhere:

- a checkpoint's ``manifest.json`` is written after its files and deleted before them, and the files
  must match its checksums, so half a checkpoint is none;
- ``metrics.jsonl`` and its like are written before the manifest, and resume cuts them to it;
- ``stages.json``, which says that a stage is finished, is written after what the stage made;
- ``config.yaml`` is fetched last: a directory without it is fetched again.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from cluster.checkpoint import MANIFEST

CHECKPOINT = re.compile(r"ppo/checkpoints/step_(\d+)/")
STAGES, CONFIG = "stages.json", "config.yaml"
RENAMES = ("local", "hdfs")
"""File systems where half a file may be seen, so it gets its name when it is whole."""


def open_storage(url: str) -> tuple[Any, str]:
    """The pyarrow file system of a URL, and the path in it. Credentials are the environment's.

    Raises:
        ValueError: Nothing here opens such a URL.
        ImportError: What opens it is not installed.
    """
    from pyarrow import ArrowInvalid, ArrowNotImplementedError, fs

    try:
        filesystem, path = fs.FileSystem.from_uri(url)
    except (ArrowInvalid, ArrowNotImplementedError):
        import fsspec

        opened, path = fsspec.core.url_to_fs(url)
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(opened))
    return filesystem, path.rstrip("/")


class RunMirror:
    """Copies one run directory to its URL and back. One process at a time may write there.

    Raises:
        OSError, ValueError, ImportError: The URL cannot be opened or listed.
    """

    def __init__(self, url: str, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._url, self._run_dir, self._warn = url, run_dir, warn
        self._filesystem, self._root = open_storage(url)
        # What lies there: size by name; and what this process knows to be the same here.
        self._there: dict[str, int] = self._list()
        self._same: dict[str, tuple[int, ...]] = {}
        self._whole = _whole_checkpoints(self._there)
        self._stages = self._stages_there()

    def fetch(self) -> bool:
        """Bring what lies there into the run directory, when it is further than that is."""
        here = self._local()
        last_here = max(_whole_checkpoints(here).values(), default=0)
        last_there = max(self._whole.values(), default=0)
        stages_here = _stage_names(self._run_dir / STAGES)
        ahead = CONFIG not in here or last_there > last_here or self._stages - stages_here
        if not self._there or not ahead:
            return False
        for name in sorted(self._there, key=_order):
            match = CHECKPOINT.match(name)
            if match is None or match[0] in self._whole:
                self._download(name)
                self._same[name] = self._signature(name)
        return True

    def sync(self, *, dropped: Sequence[str] = (), required: bool = False) -> None:
        """Copy what is new; delete checkpoints that are gone, and what was below ``dropped``.

        Args:
            dropped: Files and directories of the run that were thrown away.
            required: A failure is an error; otherwise it is a warning, and the next call copies
                what this one did not.

        Raises:
            OSError: The URL cannot be written; the run directory is as good as before.
        """
        try:
            self._sync(dropped)
        except OSError as error:
            message = (
                f"could not copy the run to {self._url} ({error}); it is whole in {self._run_dir}"
            )
            if required:
                raise OSError(f"{message}: run the same command with --resume to copy it") from None
            self._warn(f"{message}, and is copied with the next checkpoint")

    def _sync(self, dropped: Sequence[str]) -> None:
        here = self._local()
        stages = _stage_names(self._run_dir / STAGES)
        if STAGES in here and not self._stages <= stages:
            self._upload(STAGES)  # a stage was thrown away: say so before its files go
        gone = self._there.keys() - here.keys()
        self._delete(name for name in gone if any(_below(name, top) for top in dropped))
        for name in sorted(here, key=_order):
            if not self._is_there(name) and self._same.get(name) != self._signature(name):
                self._upload(name)
        # Only now, so that there is a checkpoint at every moment.
        self._delete(name for name in self._there.keys() - here.keys() if CHECKPOINT.match(name))
        self._stages = stages

    def _is_there(self, name: str) -> bool:
        """Whether a checkpoint's file was copied by an earlier process: it never changes."""
        match = CHECKPOINT.match(name)
        return match is not None and match[0] in self._whole and name not in self._same

    def _local(self) -> dict[str, int]:
        """Size of each file of the run that is worth keeping, by name."""
        found = {}
        for directory, folders, files in os.walk(self._run_dir):
            folders[:] = [f for f in folders if not _is_passing(f)]
            for file in files:
                path = Path(directory) / file
                if not _is_passing(file):
                    name = path.relative_to(self._run_dir).as_posix()
                    found[name] = path.stat().st_size
        return found

    def _list(self) -> dict[str, int]:
        from pyarrow import fs

        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found = {
            Path(info.path).relative_to(self._root).as_posix(): info.size
            for info in self._filesystem.get_file_info(selector)
            if info.type == fs.FileType.File
        }
        return {n: size for n, size in found.items() if not any(map(_is_passing, n.split("/")))}

    def _stages_there(self) -> set[str]:
        if STAGES not in self._there:
            return set()
        with self._filesystem.open_input_stream(f"{self._root}/{STAGES}") as stream:
            return set(json.loads(stream.read()))

    def _signature(self, name: str) -> tuple[int, ...]:
        """Changes when the file does; a database's writes may still lie in its log."""
        path = self._run_dir / name
        found: tuple[int, ...] = ()
        for file in (path, path.with_name(f"{path.name}-wal")):
            if file.exists():
                found += (file.stat().st_size, file.stat().st_mtime_ns)
        return found

    def _upload(self, name: str) -> None:
        from pyarrow import fs

        signature, path = self._signature(name), self._run_dir / name
        target = f"{self._root}/{name}"
        folder, _, file = target.rpartition("/")
        self._filesystem.create_dir(folder, recursive=True)
        renames = self._filesystem.type_name in RENAMES
        written = f"{folder}/.{file}.partial" if renames else target
        with tempfile.TemporaryDirectory(prefix="rlhf-copy-") as place:
            if path.suffix == ".sqlite":
                path = _snapshot(path, Path(place) / path.name)
            size = path.stat().st_size
            fs.copy_files(
                str(path),
                written,
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=self._filesystem,
            )
        if renames:
            self._filesystem.move(written, target)
        self._there[name], self._same[name] = size, signature

    def _delete(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=_order, reverse=True):
            self._filesystem.delete_file(f"{self._root}/{name}")
            del self._there[name]

    def _download(self, name: str) -> None:
        from pyarrow import fs

        path = self._run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        fs.copy_files(
            f"{self._root}/{name}",
            str(partial),
            source_filesystem=self._filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )
        partial.replace(path)


def _order(name: str) -> tuple[int, str]:
    """Whatever vouches for other files comes after them."""
    if CHECKPOINT.match(name) and name.endswith(f"/{MANIFEST}"):
        return 1, name
    return {STAGES: 2, CONFIG: 3}.get(name, 0), name


def _whole_checkpoints(names: Iterable[str]) -> dict[str, int]:
    """Directory and step of each checkpoint that has its manifest."""
    found = {}
    for name in names:
        match = CHECKPOINT.match(name)
        if match and name == match[0] + MANIFEST:
            found[match[0]] = int(match[1])
    return found


def _stage_names(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    done: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return set(done)


def _is_passing(name: str) -> bool:
    """Locks, what is half written or damaged, and a database's log, which goes with its file."""
    return name.startswith((".", "damaged_")) or name.endswith((".partial", "-wal", "-shm"))


def _below(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}/")


def _snapshot(database: Path, copy: Path) -> Path:
    """A whole copy of an SQLite file, whoever else has it open."""
    with closing(sqlite3.connect(database)) as live, closing(sqlite3.connect(copy)) as target:
        live.backup(target)
    return copy
