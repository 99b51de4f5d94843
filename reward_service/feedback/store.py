"""The store of judgements: append-only, shared by people and simulated judges.

Nothing is changed, and nothing is deleted but at a person's wish or when its time is over
(``feedback.erasure``): a new judgement of the same item by the same annotator supersedes the old
one, and one that is taken back is superseded by a row that says so. All of them stay on record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Table, select

from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Ranking, Rating
from reward_service.feedback import schema
from reward_service.feedback.database import Database

_CHUNK = 500  # keys in one query; databases limit the number of parameters

Row = dict[str, Any]
Record = TypeVar("Record", Comparison, Rating, Ranking)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry(Generic[Record]):
    """A row of the history.

    Attributes:
        judgement: What was said.
        withdrawn: This row takes back the annotator's earlier judgement of the item.
        repeat: 1 when the item was shown to the annotator a second time on purpose.
    """

    judgement: Record
    withdrawn: bool = False
    repeat: int = 0


class FeedbackStore:
    """Judgements on disk.

    Example:
        >>> with FeedbackStore(Path("runs/x/feedback.sqlite")) as store:
        ...     store.add_comparisons(judgements)  # again is harmless
        ...     comparisons = store.comparisons()
    """

    def __init__(self, location: Path | str | Database) -> None:
        """Open, and create where there is nothing yet.

        Args:
            location: A file for SQLite, any SQLAlchemy URL (``postgresql+psycopg://...``), or a
                database that is open already.

        Raises:
            ValueError: Not a database, or one with another schema.
        """
        self.database = location if isinstance(location, Database) else Database(location)

    def close(self) -> None:
        self.database.close()

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
        return self._insert(lambda c: self._insert_new(c, schema.annotators, rows))

    def add_pairs(self, pairs: Iterable[Pair]) -> int:
        """Add those that are new; how many. Raises ValueError for other content of the same id."""
        return self._insert(lambda connection: self.write_pairs(connection, pairs))

    def write_pairs(self, connection: Connection, pairs: Iterable[Pair]) -> int:
        """``add_pairs`` inside a transaction of the caller's."""
        rows = {p.item_id: _pair_row(p) for p in pairs}
        return self._insert_new(connection, schema.pairs, rows)

    def add_comparisons(self, comparisons: Sequence[Comparison]) -> int:
        """Add judgements with their pairs and annotators, all or none; how many were new.

        A judgement that is there already, equal in every field, is not added twice.
        """
        return self.add_history([Entry(judgement=c) for c in comparisons])

    def add_ratings(self, ratings: Sequence[Rating]) -> int:
        """Add ratings with their annotators, all or none; how many were new."""
        return self.add_history([Entry(judgement=r) for r in ratings])

    def add_history(self, entries: Sequence[Entry[Any]]) -> int:
        """Add comparisons and ratings as a history has them, all or none; how many were new."""
        return self._insert(lambda connection: self.write_history(connection, entries))

    def write_history(self, connection: Connection, entries: Sequence[Entry[Any]]) -> int:
        """``add_history`` inside a transaction of the caller's."""
        said = [entry.judgement for entry in entries]
        annotators = {j.annotator.annotator_id: _annotator_row(j.annotator) for j in said}
        pairs = {j.pair.item_id: _pair_row(j.pair) for j in said if isinstance(j, Comparison)}
        self._insert_new(connection, schema.annotators, annotators)
        self._insert_new(connection, schema.pairs, pairs)
        added = 0
        for record, table, row_of in _KINDS:
            rows = _keyed(
                {**row_of(e.judgement), "withdrawn": e.withdrawn, "repeat": e.repeat}
                for e in entries
                if isinstance(e.judgement, record)
            )
            if table is schema.comparisons:
                rows = _without_known_as_first(connection, rows)
            added += self._insert_new(connection, table, rows, key="key")
        return added

    def annotators(self) -> list[Annotator]:
        return [_annotator(row) for row in self._rows(schema.annotators, "annotator_id")]

    def pairs(self) -> list[Pair]:
        return [_pair(row) for row in self._rows(schema.pairs, "item_id")]

    def comparisons(self, *, history: bool = False) -> list[Comparison]:
        """Judgements in the order in which they were added.

        The last of an annotator on an item counts, unless it was taken back; second looks and
        gold items, which measure the annotator, are left out. With ``history`` all that was said.
        """
        return _chosen(self.comparison_history(), history, self.gold_items())

    def ratings(self, *, history: bool = False) -> list[Rating]:
        """Ratings, as ``comparisons``; the last on an item and a criterion counts."""
        return _chosen(self.rating_history(), history, self.gold_items())

    def rankings(self) -> list[Ranking]:
        """Rankings that hold, as ``comparisons``."""
        return _chosen(self.ranking_history(), False, self.gold_items())

    def preferences(self) -> list[Comparison]:
        """All that teaches a reward model: the comparisons, and those that rankings imply."""
        return self.comparisons() + [c for r in self.rankings() for c in r.comparisons()]

    def comparison_history(self) -> list[Entry[Comparison]]:
        """Every row on comparisons, in order: the audit log."""
        annotators = {a.annotator_id: a for a in self.annotators()}
        pairs = {p.item_id: p for p in self.pairs()}
        return [
            _entry(
                row,
                Comparison(
                    pair=pairs[row["item_id"]],
                    annotator=annotators[row["annotator_id"]],
                    choice=row["choice"],
                    strength=row["strength"],
                    shown_first=row["shown_first"],
                    seconds=row["seconds"],
                    created_at=row["created_at"],
                ),
            )
            for row in self._rows(schema.comparisons, "number")
        ]

    def rating_history(self) -> list[Entry[Rating]]:
        """Every row on ratings, in order."""
        annotators = {a.annotator_id: a for a in self.annotators()}
        return [
            _entry(
                row,
                Rating(
                    item_id=row["item_id"],
                    prompt_id=row["prompt_id"],
                    prompt=row["prompt"],
                    response=Candidate(text=row["response"], model=row["model"]),
                    annotator=annotators[row["annotator_id"]],
                    criterion=row["criterion"],
                    value=row["value"],
                    created_at=row["created_at"],
                ),
            )
            for row in self._rows(schema.ratings, "number")
        ]

    def ranking_history(self) -> list[Entry[Ranking]]:
        """Every row on rankings, in order."""
        annotators = {a.annotator_id: a for a in self.annotators()}
        contents = {
            row["task_id"]: row["content"]
            for row in self._rows(schema.tasks, "task_id")
            if row["kind"] == "ranking"
        }
        return [
            _entry(
                row,
                Ranking(
                    item_id=row["item_id"],
                    prompt_id=(content := contents[row["item_id"]])["prompt_id"],
                    prompt=content["prompt"],
                    messages=tuple(content["messages"]),
                    candidates=tuple(Candidate(**c) for c in content["candidates"]),
                    annotator=annotators[row["annotator_id"]],
                    ranking=tuple(row["ranking"]),
                    seconds=row["seconds"],
                    created_at=row["created_at"],
                ),
            )
            for row in self._rows(schema.rankings, "number")
        ]

    def gold_items(self) -> set[str]:
        """Items whose answer is known beforehand."""
        return set(self.gold_answers())

    def gold_answers(self) -> dict[str, dict[str, Any]]:
        """Item -> its known answer, for those that have one."""
        columns = schema.tasks.c.task_id, schema.tasks.c.gold
        query = select(*columns).where(schema.tasks.c.gold.is_not(None))
        return self.database.read(lambda c: {r.task_id: r.gold for r in c.execute(query)})

    def _insert(self, work: Callable[[Connection], int]) -> int:
        return self.database.write(work)

    def _insert_new(
        self, connection: Connection, table: Table, rows: Mapping[str, Row], key: str = ""
    ) -> int:
        """Insert rows whose key is not there; a row that is there must be equal."""
        key = key or next(iter(table.primary_key.columns)).name
        columns = [c for c in table.columns if c.name not in ("number", "stored_at")]
        existing: dict[str, Row] = {}
        for keys in _chunks(list(rows)):
            query = select(*columns).where(table.c[key].in_(keys))
            existing |= {row[key]: dict(row) for row in connection.execute(query).mappings()}
        for name, row in existing.items():
            for column, value in row.items():
                if rows[name][column] != value:
                    raise ValueError(
                        f"{table.name}: {name!r} is in {self.database.shown} already with another "
                        f"{column}: what was judged must not change, use a new id"
                    )
        new = [row for name, row in rows.items() if name not in existing]
        if "stored_at" in table.columns:
            new = [row | {"stored_at": now()} for row in new]
        if new:
            connection.execute(table.insert(), new)
        return len(new)

    def _rows(self, table: Table, order: str) -> list[Row]:
        query = select(table).order_by(table.c[order])
        return self.database.read(lambda c: [dict(r) for r in c.execute(query).mappings()])


def now() -> str:
    """The time, ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _keyed(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by a hash of their content, which makes adding them again harmless."""
    keyed: dict[str, Row] = {}
    for row in rows:
        # Stores of version 0.1.0 hashed rows without these two.
        hashed = {k: v for k, v in row.items() if v or k not in ("withdrawn", "repeat")}
        content = json.dumps(hashed, sort_keys=True, ensure_ascii=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        keyed[key] = row | {"key": key}
    return keyed


def _chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), _CHUNK):
        yield keys[start : start + _CHUNK]


def _without_known_as_first(connection: Connection, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Without judgements of unknown order that are there as of "a first": before an order could be
    unknown, they were stored so."""
    as_first: dict[str, str] = {}
    for key, row in rows.items():
        if not row["shown_first"]:
            plain = {name: value for name, value in row.items() if name != "key"}
            (first,) = _keyed([plain | {"shown_first": "a"}])
            as_first[first] = key
    column = schema.comparisons.c.key
    known: set[str] = set()
    for keys in _chunks(list(as_first)):
        query = select(column).where(column.in_(keys))
        known |= {as_first[found] for found in connection.execute(query).scalars()}
    return {key: row for key, row in rows.items() if key not in known}


def _entry(row: Row, judgement: Record) -> Entry[Record]:
    return Entry(judgement=judgement, withdrawn=row["withdrawn"], repeat=row["repeat"])


def _chosen(entries: Sequence[Entry[Record]], history: bool, gold: set[str]) -> list[Record]:
    """What holds: the last row of an annotator on an item (and criterion), if not withdrawn."""
    if history:
        return [entry.judgement for entry in entries if not entry.withdrawn]
    latest: dict[tuple[str, ...], int] = {}
    for number, entry in enumerate(entries):
        if not entry.repeat:
            latest[identity(entry.judgement)] = number
    return [
        entries[number].judgement
        for number in sorted(latest.values())
        if not entries[number].withdrawn and item_of(entries[number].judgement) not in gold
    ]


def identity(judgement: Comparison | Rating | Ranking) -> tuple[str, ...]:
    """(item, annotator, criterion): two judgements with the same are one's change of mind."""
    criterion = judgement.criterion if isinstance(judgement, Rating) else ""
    return (item_of(judgement), judgement.annotator.annotator_id, criterion)


def item_of(judgement: Comparison | Rating | Ranking) -> str:
    return judgement.pair.item_id if isinstance(judgement, Comparison) else judgement.item_id


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


def _ranking_row(ranking: Ranking) -> Row:
    return {
        "item_id": ranking.item_id,
        "annotator_id": ranking.annotator.annotator_id,
        "ranking": list(ranking.ranking),
        "seconds": ranking.seconds,
        "created_at": ranking.created_at,
    }


_KINDS: tuple[tuple[type, Table, Callable[[Any], Row]], ...] = (
    (Comparison, schema.comparisons, _comparison_row),
    (Rating, schema.ratings, _rating_row),
    (Ranking, schema.rankings, _ranking_row),
)
