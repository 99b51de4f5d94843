"""Rows of data files, each with the place it came from: JSONL, CSV, Parquet, Hugging Face datasets.

Nothing here knows what a row means; ``actors.datasets`` does. Whatever is wrong with a file is a
ValueError that begins with its name and, where there is one, the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

_HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(@(?P<split>[\w.:%\[\]-]+))?"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        source: File or data set, for messages: ``data/train.jsonl``.
        where: The row's place, for messages: ``data/train.jsonl:17`` (a line, counted from 1) or
            ``train.parquet: row 17``.
        default_id: Identity for rows that have none: ``train:17``.
        values: Column name to value.
    """

    source: str
    where: str
    default_id: str
    values: dict[str, Any]


def read_rows(source: str, split: str) -> Iterator[Row]:
    """Rows of a source as ``DataConfig`` describes sources, in file order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read; the message names the file and the line.
    """
    if any(character in source for character in "*?"):
        pattern = Path(source).expanduser()
        root = Path(pattern.anchor)
        paths = sorted(root.glob(str(pattern.relative_to(root))))
        if not paths:
            raise FileNotFoundError(f"{source}: no file matches this pattern")
        return chain.from_iterable(_read_file(path) for path in paths)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_saved_dataset(path, split)
    if path.exists():
        return _read_file(path)
    name = _HUB_NAME.fullmatch(source)
    if name is None or _reader_of(path) is not None:
        raise FileNotFoundError(f"{source}: no such file (looked for {path.absolute()})")
    return _read_hub(source, name["name"], name["subset"], name["split"] or split)


def _reader_of(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    for endings, reader in (
        ((".jsonl", ".jsonl.gz", ".ndjson"), _read_jsonl),
        ((".csv", ".csv.gz"), _read_csv),
        ((".parquet",), _read_parquet),
    ):
        if path.name.lower().endswith(endings):
            return reader
    return None


def _read_file(path: Path) -> Iterator[Row]:
    reader = _reader_of(path)
    if reader is None:
        raise ValueError(
            f"{path}: unknown kind of file {path.suffix!r}: use .jsonl, .jsonl.gz, .csv, .parquet "
            "or a directory saved by the datasets library"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    return reader(path)


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line of a UTF-8 file, compressed or not, without the line break."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from _decoded(path, file)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from None


def _decoded(path: Path, file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x} at column "
                f"{error.start + 1}: save the file as UTF-8"
            ) from None
        yield number, text.rstrip("\r\n")


def _read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object per line. Blank lines say nothing and are passed over."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            hint = (
                " (one JSON object per line; this looks like a JSON array)"
                if number == 1 and line.lstrip().startswith("[")
                else ""
            )
            raise ValueError(
                f"{where}: not valid JSON at column {error.colno}: {error.msg}{hint}"
            ) from None
        if not isinstance(values, dict):
            raise ValueError(
                f'{where}: a row must be a JSON object like {{"prompt": ...}}, '
                f"got {kind_of(values)}"
            )
        yield Row(str(path), where, f"{_stem(path)}:{number}", values)


def _read_csv(path: Path) -> Iterator[Row]:
    """Comma-separated, with a header; quoted cells may contain commas and line breaks.

    The standard library's reader rather than pandas', because it knows a row's line.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    first_line = 1
    while True:
        first_line = reader.line_num + 1
        where = f"{path}:{first_line}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: not valid CSV: {error}") from None
        if not cells:
            continue
        if header is None:
            header = _checked_header(where, cells)
        elif len(cells) != len(header):
            raise ValueError(
                f"{where}: the row has {len(cells)} cells, the header names {len(header)} columns: "
                "put cells with commas or line breaks in double quotes"
            )
        else:
            values = dict(zip(header, cells, strict=True))
            yield Row(str(path), where, f"{_stem(path)}:{first_line}", values)


def _checked_header(where: str, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    for name in header:
        if not name or header.count(name) > 1:
            problem = f"column {name!r} occurs twice" if name else "a column has no name"
            raise ValueError(f"{where}: {problem} in the header")
    return header


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    where = f"{path}: row {number}"
                    yield Row(str(path), where, f"{_stem(path)}:{number}", values)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None


def _read_saved_dataset(path: Path, split: str) -> Iterator[Row]:
    """A directory written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"{path}: a directory, but not one saved by the datasets library (no state.json or "
            "dataset_dict.json): name a file, or a pattern such as "
            f"{path}/*.jsonl"
        )
    datasets = _import_datasets(str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # many kinds; all mean that the directory is damaged
        raise ValueError(f"{path}: the data set cannot be loaded: {_one_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(
                f"{path}: no split {split!r}, there is {', '.join(sorted(loaded))}: set data.split"
            )
        loaded = loaded[split]
    return _dataset_rows(str(path), path.name, loaded)


def _read_hub(source: str, name: str, subset: str | None, split: str) -> Iterator[Row]:
    datasets = _import_datasets(source)
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # offline, missing, gated, no such split: the library says which
        raise ValueError(
            f"{source}: no such file, and as a data set of the Hugging Face hub it cannot be "
            f"loaded: {_one_line(error)}"
        ) from None
    return _dataset_rows(source, name, loaded)


def _import_datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source}: reading this needs the datasets library: pip install datasets"
        ) from None
    return datasets


def _dataset_rows(source: str, name: str, loaded: Any) -> Iterator[Row]:
    for number, values in enumerate(loaded, start=1):
        yield Row(source, f"{source}: row {number}", f"{name}:{number}", dict(values))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, int | float) else "a value")
