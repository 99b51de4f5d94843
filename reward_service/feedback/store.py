"""The store of judgements: append-only, shared by people and simulated judges.

SQLite with a write-ahead log by default, so that several processes may read and write at once on
one machine; any other SQLAlchemy URL for a server. Nothing is ever changed or deleted: a new
judgement of the same item by the same annotator supersedes the old one, which stays on record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError

from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Rating

SCHEMA_VERSION = 1
_TRIES = 5
_CHUNK = 500  # keys in one query; databases limit the number of parameters

_metadata = MetaData()
_schema = Table("feedback_schema", _metadata, Column("version", Integer, primary_key=True))
_annotators = Table(
    "annotators",
    _metadata,
    Column("annotator_id", String(128), primary_key=True),
    Column("kind", String(16), nullable=False),
)
_pairs = Table(
    "pairs",
    _metadata,
    Column("item_id", String(256), primary_key=True),
    Column("prompt_id", String(256), nullable=False, index=True),
    Column("prompt", Text, nullable=False),
    Column("messages", JSON, nullable=False),
    Column("a_text", Text, nullable=False),
    Column("a_model", String(256), nullable=False),
    Column("b_text", Text, nullable=False),
    Column("b_model", String(256), nullable=False),
)
_comparisons = Table(
    "comparisons",
    _metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("key", String(64), nullable=False, unique=True),
    Column("item_id", ForeignKey("pairs.item_id"), nullable=False, index=True),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    Column("choice", String(16), nullable=False),
    Column("strength", Integer, nullable=False),
    Column("shown_first", String(1), nullable=False),
    Column("seconds", Float, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("stored_at", String(40), nullable=False),
)
_ratings = Table(
    "ratings",
    _metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("key", String(64), nullable=False, unique=True),
    Column("item_id", String(256), nullable=False, index=True),
    Column("prompt_id", String(256), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("response", Text, nullable=False),
    Column("model", String(256), nullable=False),
    Column("annotator_id", ForeignKey("annotators.annotator_id"), nullable=False, index=True),
    Column("criterion", String(128), nullable=False),
    Column("value", Integer, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("stored_at", String(40), nullable=False),
)

Row = dict[str, Any]
Record = TypeVar("Record", Comparison, Rating)


class FeedbackStore:
    """Judgements on disk.

    Example:
        >>> with FeedbackStore(Path("runs/x/feedback.sqlite")) as store:
        ...     store.add_comparisons(judgements)  # again is harmless
        ...     comparisons = store.comparisons()
    """

    def __init__(self, location: Path | str) -> None:
        """Open, and create where there is nothing yet.

        Args:
            location: A file for SQLite, or any SQLAlchemy URL (``postgresql+psycopg://...``).

        Raises:
            ValueError: Not a database, or one with another schema.
        """
        text = str(location)
        if "://" in text:
            url = make_url(text)
        else:
            Path(text).parent.mkdir(parents=True, exist_ok=True)
            url = make_url("sqlite://").set(database=text)
        self._shown = url.render_as_string(hide_password=True)
        try:
            self._engine = create_engine(url)
        except (ArgumentError, ModuleNotFoundError) as error:
            raise ValueError(
                f"{self._shown} cannot be used as a database: {error}: check the URL, and that "
                "its driver is installed"
            ) from None
        if url.get_backend_name() == "sqlite":
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        try:
            self._create_or_check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_annotators(self, annotators: Iterable[Annotator]) -> int:
        """Add those that are new; how many. Raises ValueError for another kind of the same id."""
        rows = {a.annotator_id: _annotator_row(a) for a in annotators}
        return self._write(lambda c: self._insert_new(c, _annotators, "annotator_id", rows))

    def add_pairs(self, pairs: Iterable[Pair]) -> int:
        """Add those that are new; how many. Raises ValueError for other content of the same id."""
        rows = {p.item_id: _pair_row(p) for p in pairs}
        return self._write(lambda c: self._insert_new(c, _pairs, "item_id", rows))

    def add_comparisons(self, comparisons: Sequence[Comparison]) -> int:
        """Add judgements with their pairs and annotators, all or none; how many were new.

        A judgement that is there already, equal in every field, is not added twice.
        """
        pairs = {c.pair.item_id: _pair_row(c.pair) for c in comparisons}
        annotators = {c.annotator.annotator_id: _annotator_row(c.annotator) for c in comparisons}
        rows = _keyed(_comparison_row(c) for c in comparisons)

        def write(connection: Connection) -> int:
            self._insert_new(connection, _annotators, "annotator_id", annotators)
            self._insert_new(connection, _pairs, "item_id", pairs)
            return self._insert_new(connection, _comparisons, "key", rows)

        return self._write(write)

    def add_ratings(self, ratings: Sequence[Rating]) -> int:
        """Add ratings with their annotators, all or none; how many were new."""
        annotators = {r.annotator.annotator_id: _annotator_row(r.annotator) for r in ratings}
        rows = _keyed(_rating_row(r) for r in ratings)

        def write(connection: Connection) -> int:
            self._insert_new(connection, _annotators, "annotator_id", annotators)
            return self._insert_new(connection, _ratings, "key", rows)

        return self._write(write)

    def annotators(self) -> list[Annotator]:
        return [_annotator(row) for row in self._read(_annotators, "annotator_id")]

    def pairs(self) -> list[Pair]:
        return [_pair(row) for row in self._read(_pairs, "item_id")]

    def comparisons(self, *, history: bool = False) -> list[Comparison]:
        """Judgements in the order in which they were added.

        The last of an annotator on an item counts; with ``history`` the superseded ones too.
        """
        annotators = {a.annotator_id: a for a in self.annotators()}
        pairs = {p.item_id: p for p in self.pairs()}
        found = [
            Comparison(
                pair=pairs[row["item_id"]],
                annotator=annotators[row["annotator_id"]],
                choice=row["choice"],
                strength=row["strength"],
                shown_first=row["shown_first"],
                seconds=row["seconds"],
                created_at=row["created_at"],
            )
            for row in self._read(_comparisons, "number")
        ]
        if history:
            return found
        return _last(found, lambda c: (c.pair.item_id, c.annotator.annotator_id))

    def ratings(self, *, history: bool = False) -> list[Rating]:
        """Ratings, as ``comparisons``; the last on an item and a criterion counts."""
        annotators = {a.annotator_id: a for a in self.annotators()}
        found = [
            Rating(
                item_id=row["item_id"],
                prompt_id=row["prompt_id"],
                prompt=row["prompt"],
                response=Candidate(text=row["response"], model=row["model"]),
                annotator=annotators[row["annotator_id"]],
                criterion=row["criterion"],
                value=row["value"],
                created_at=row["created_at"],
            )
            for row in self._read(_ratings, "number")
        ]
        if history:
            return found
        return _last(found, lambda r: (r.item_id, r.annotator.annotator_id, r.criterion))

    def _create_or_check(self) -> None:
        def write(connection: Connection) -> int:
            existing = set(inspect(connection).get_table_names())
            if existing and _schema.name not in existing:
                raise ValueError(
                    f"{self._shown} holds other tables ({sorted(existing)[0]}, ...) and is no "
                    "store of judgements: give another file or database"
                )
            if not existing:
                _metadata.create_all(connection)
                connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            version = connection.execute(select(_schema.c.version)).scalar_one()
            if version != SCHEMA_VERSION:
                raise ValueError(
                    f"{self._shown} has schema version {version}, this program reads "
                    f"{SCHEMA_VERSION}: use the version of ray-rlhf that wrote it"
                )
            return 0

        try:
            self._write(write)
        except DatabaseError as error:
            raise ValueError(
                f"{self._shown} cannot be opened as a database: {error.orig}"
            ) from None

    def _write(self, work: Callable[[Connection], int]) -> int:
        """Run ``work`` in one transaction; again when another writer got in between."""
        for tries in range(_TRIES):
            try:
                with self._engine.connect() as connection:
                    with connection.execution_options(rlhf_writes=True).begin():
                        return work(connection)
            except (IntegrityError, OperationalError):
                if tries == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _insert_new(
        self, connection: Connection, table: Table, key: str, rows: dict[str, Row]
    ) -> int:
        """Insert rows whose key is not there; a row that is there must be equal."""
        columns = [c for c in table.columns if c.name not in ("number", "stored_at")]
        existing: dict[str, Row] = {}
        keys = list(rows)
        for start in range(0, len(keys), _CHUNK):
            query = select(*columns).where(table.c[key].in_(keys[start : start + _CHUNK]))
            existing |= {row[key]: dict(row) for row in connection.execute(query).mappings()}
        for name, row in existing.items():
            for column, value in row.items():
                if rows[name][column] != value:
                    raise ValueError(
                        f"{table.name}: {name!r} is in {self._shown} already with another "
                        f"{column}: what was judged must not change, use a new id"
                    )
        new = [row for name, row in rows.items() if name not in existing]
        if "stored_at" in table.columns:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            new = [row | {"stored_at": now} for row in new]
        if new:
            connection.execute(table.insert(), new)
        return len(new)

    def _read(self, table: Table, order: str) -> Iterator[Row]:
        with self._engine.connect() as connection:
            query = select(table).order_by(table.c[order])
            for row in connection.execute(query).mappings():
                yield dict(row)


def _configure_sqlite(connection: Any, _: Any) -> None:
    # Transactions are begun by hand: the driver's own begin too late to wait for a lock.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "busy_timeout=30000",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once. Upgrading a reader that saw an older state would fail
    # immediately, whatever the timeout.
    writes = connection.get_execution_options().get("rlhf_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _keyed(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by a hash of their content, which makes adding them again harmless."""
    keyed: dict[str, Row] = {}
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        keyed[key] = row | {"key": key}
    return keyed


def _last(records: Sequence[Record], key: Callable[[Record], tuple[str, ...]]) -> list[Record]:
    latest = {key(record): number for number, record in enumerate(records)}
    return [records[number] for number in sorted(latest.values())]


def _annotator_row(annotator: Annotator) -> Row:
    return {"annotator_id": annotator.annotator_id, "kind": annotator.kind}


def _annotator(row: Row) -> Annotator:
    return Annotator(annotator_id=row["annotator_id"], kind=row["kind"])


def _pair_row(pair: Pair) -> Row:
    return {
        "item_id": pair.item_id,
        "prompt_id": pair.prompt_id,
        "prompt": pair.prompt,
        "messages": [dict(message) for message in pair.messages],
        "a_text": pair.a.text,
        "a_model": pair.a.model,
        "b_text": pair.b.text,
        "b_model": pair.b.model,
    }


def _pair(row: Row) -> Pair:
    return Pair(
        item_id=row["item_id"],
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        a=Candidate(text=row["a_text"], model=row["a_model"]),
        b=Candidate(text=row["b_text"], model=row["b_model"]),
        messages=tuple(row["messages"]),
    )


def _comparison_row(comparison: Comparison) -> Row:
    return {
        "item_id": comparison.pair.item_id,
        "annotator_id": comparison.annotator.annotator_id,
        "choice": comparison.choice,
        "strength": comparison.strength,
        "shown_first": comparison.shown_first,
        "seconds": comparison.seconds,
        "created_at": comparison.created_at,
    }


def _rating_row(rating: Rating) -> Row:
    return {
        "item_id": rating.item_id,
        "prompt_id": rating.prompt_id,
        "prompt": rating.prompt,
        "response": rating.response.text,
        "model": rating.response.model,
        "annotator_id": rating.annotator.annotator_id,
        "criterion": rating.criterion,
        "value": rating.value,
        "created_at": rating.created_at,
    }
