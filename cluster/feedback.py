"""The ``rlhf feedback`` commands: judgements in and out of a run's store, and people's rights."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from actors.data_files import read_rows
from cluster.config import RunConfig, load_config
from reward_service.comparison import Annotator, Pair
from reward_service.config import CollectConfig, PeopleConfig
from reward_service.feedback.agreement_report import store_report
from reward_service.feedback.assignment import Assignments, open_pairs
from reward_service.feedback.erasure import data_of, erase, expire
from reward_service.feedback.formats import (
    Format,
    entry_row,
    item_pair,
    item_task,
    preference_row,
    preference_rows,
    row_entry,
    row_gold,
)
from reward_service.feedback.presidio import scanner_of
from reward_service.feedback.raters import rater_quality
from reward_service.feedback.store import Entry, FeedbackStore, item_of
from reward_service.feedback.tasks import Answer
from reward_service.feedback.transfer import Imported, import_entries, masked_task

Say = Callable[[str], None]
STORE = "feedback.sqlite"
FIGURES = ("feedback.json", "stages.json", "report.html")
"""Files of a run, or of a round of ``rlhf loop``, that name people with their figures."""
MANIFEST = ".manifest.json"


def run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run directory keeps; a bare one for a directory without."""
    path = run_dir / "config.yaml"
    return load_config(path) if path.is_file() else RunConfig(run_dir=run_dir)


def store_location(run_dir: Path) -> str:
    """Where the judgements of a run are: a file, or the URL that it is configured with."""
    config = run_config(run_dir)
    if config.collect is not None and config.collect.store is not None:
        return config.collect.store
    return str(run_dir / STORE)


def open_existing(run_dir: Path) -> FeedbackStore:
    """The store of a run that has one.

    Raises:
        FileNotFoundError: The run has no judgements yet.
    """
    location = store_location(run_dir)
    if "://" not in location and not Path(location).is_file():
        raise FileNotFoundError(
            f"{run_dir} has no judgements ({location} is missing): run `rlhf collect` first, or "
            "`rlhf feedback import`"
        )
    return FeedbackStore(location)


def import_files(
    run_dir: Path, files: Sequence[Path], *, form: Format, items: Path | None, masking: bool
) -> Imported:
    """Read files of judgements into a run's store.

    Raises:
        ValueError: A row is wrong, or a file is not the one that its manifest describes.
    """
    digest = hashlib.sha256()
    entries: list[Entry[Any]] = []
    gold: dict[str, Answer] = {}
    pairs = _items(items) if items else {}
    for path in files:
        _check_manifest(path)
        digest.update(_hash(path).encode())
        annotator = Annotator(annotator_id=f"import:{path.name.split('.')[0]}", kind="human")
        for row in read_rows(str(path), "train"):
            if form == "votes":
                entry = row_entry(row.values, pairs, row.where)
                entries.append(entry)
                answer = row_gold(row.values, entry, row.where)
                if answer is not None:
                    gold[item_of(entry.judgement)] = answer
            else:
                item_id = str(row.values.get("id") or row.default_id)
                judgement = preference_row(
                    row.values, row.where, item_id=item_id, annotator=annotator
                )
                entries.append(Entry(judgement=judgement))
    if items is not None:
        digest.update(_hash(items).encode())
    config = run_config(run_dir).collect or CollectConfig()
    with FeedbackStore(store_location(run_dir)) as store:
        return import_entries(
            store,
            entries,
            manifest_hash=digest.hexdigest(),
            form=form,
            gold=gold,
            masking=masking,
            scanner=scanner_of(config.people.privacy),
        )


def import_tasks(run_dir: Path, files: Sequence[Path], *, gold: bool, masking: bool) -> int:
    """What is to be judged, or has a known answer, into the queue; how many were new.

    Raises:
        ValueError: A row is wrong, or an item of the same id shows something else.
    """
    config = run_config(run_dir).collect or CollectConfig()
    scanner = scanner_of(config.people.privacy)
    tasks = []
    for path in files:
        _check_manifest(path)
        for row in read_rows(str(path), "train"):
            task = item_task(
                row.values,
                row.where,
                gold=gold,
                overlap=config.people.overlap,
                criteria=config.people.criteria,
            )
            tasks.append(masked_task(task, scanner) if masking else task)
    with FeedbackStore(store_location(run_dir)) as store:
        return Assignments(store, config.people).add_tasks(tasks)


def prioritise(run_dir: Path, models: Sequence[str]) -> int:
    """Ask next about the open pairs of which reward models are least sure; how many there are.

    Raises:
        ValueError: No pair is open.
    """
    from cluster.people import least_sure

    with open_existing(run_dir) as store:
        pairs = store.database.read(open_pairs)
        if not pairs:
            raise ValueError(f"{run_dir} has no open pairs to put in order")
        chosen, values = least_sure(pairs, models, len(pairs))
        order = {pair.item_id: value for pair, value in zip(chosen, values, strict=True)}
        Assignments(store, PeopleConfig()).set_priorities(order)
    return len(order)


def export_file(run_dir: Path, path: Path, *, form: Format) -> dict[str, Any]:
    """Write judgements with a manifest beside them; returns the manifest.

    ``votes`` has the whole history; the preference formats have what holds, one row a pair.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name")
    with open_existing(run_dir) as store:
        if form == "votes":
            history: list[Entry[Any]] = [
                *store.comparison_history(),
                *store.rating_history(),
                *store.ranking_history(),
            ]
            gold = store.gold_answers()
            rows = [entry_row(entry, gold.get(item_of(entry.judgement))) for entry in history]
        else:
            rows = list(preference_rows(store.preferences(), form))
        people = len({a.annotator_id for a in store.annotators()})
    _write_rows(path, rows)
    manifest = {
        "file": path.name,
        "format": form,
        "rows": len(rows),
        "annotators": people,
        "sha256": _hash(path),
    }
    beside = path.with_name(path.name + MANIFEST)
    beside.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return manifest


def export_person(run_dir: Path, person: str, path: Path) -> int:
    """Everything that is stored of a person, as JSON; how many rows."""
    with open_existing(run_dir) as store:
        found = data_of(store, person)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return sum(len(rows) for rows in found.values() if isinstance(rows, list))


def erase_person(run_dir: Path, person: str) -> int:
    with open_existing(run_dir) as store:
        return erase(store, person)


def files_with_figures(run_dir: Path) -> list[Path]:
    """Those of ``FIGURES`` that there are: an erasure does not change them."""
    places = [run_dir, *sorted(run_dir.glob("round-*"))]
    return [place / name for place in places for name in FIGURES if (place / name).is_file()]


def enforce_retention(run_dir: Path, days: int | None) -> tuple[int, int]:
    """(judgements, people) deleted because their time was over."""
    collect = run_config(run_dir).collect
    if days is None:
        days = collect.people.retention_days if collect else 365
    with open_existing(run_dir) as store:
        found = expire(store, days)
    return found.judgements, found.people


def print_stats(run_dir: Path, say: Say, *, as_json: bool) -> None:
    """Agreement, people and ratings of a run."""
    with open_existing(run_dir) as store:
        report = store_report(store)
        quality = rater_quality(store)
    rated = report.pop("ratings")
    if as_json:
        agreement = report if report["items"] else None
        say(json.dumps({"agreement": agreement, "ratings": rated}, ensure_ascii=False))
        return
    if not report["items"] and not rated:
        say("there are no judgements yet")
        return
    say(report["summary"])
    for name in ("percent", "cohen", "fleiss", "alpha", "graded_alpha", "ac1"):
        if report[name] is not None:
            say(f"  {name:<14}{_interval(report[name])}   {report[name]['reading']}")
    for criterion, found in rated.items():
        say(f"{criterion}: mean {found['mean']:.2f} of {found['ratings']} ratings")
        for name in ("percent", "ordinal_alpha", "interval_alpha"):
            if found[name] is not None:
                say(f"  {name:<14}{_interval(found[name])}")
    for person in quality:
        parts = [f"{person.judgements} judgements"]
        for label, share in (
            ("right on gold", person.gold),
            ("same again", person.self_consistency),
            ("first shown wins", person.first_share),
            ("longer wins", person.longer_share),
        ):
            if share is not None:
                parts.append(f"{label} {share.value:.0%} [{share.low:.0%}, {share.high:.0%}]")
        if person.too_fast:
            parts.append(f"very fast ({person.seconds:.1f} s)")
        say(f"  {person.annotator_id:<20}{', '.join(parts)}")


def serve_judging(
    config_path: Path | None,
    run_dir: Path | None,
    overrides: Sequence[str],
    *,
    host: str | None,
    port: int | None,
) -> None:
    """The page on which people judge, until Ctrl-C; needs neither Ray nor a model.

    Raises:
        ValueError: Neither a configuration nor a run directory is given, or both.
    """
    if (config_path is None) == (run_dir is None):
        raise ValueError("the page needs one of --run DIR and --config FILE")
    if config_path is None:
        assert run_dir is not None
        config_path = run_dir / "config.yaml"
        if not config_path.is_file():
            config_path, overrides = None, [f"run_dir={run_dir}", *overrides]
    config = load_config(config_path, overrides)
    collect = config.collect or CollectConfig()
    changes: dict[str, Any] = {} if host is None else {"host": host}
    if port is not None:
        changes["port"] = port
    people = collect.people.model_copy(update=changes)
    location = collect.store or str(config.run_dir / STORE)
    from reward_service.feedback.page.serve import serve_page

    config.run_dir.mkdir(parents=True, exist_ok=True)
    serve_page(location, people, config.run_dir, say=lambda text: print(text, flush=True))


def _interval(measured: dict[str, Any]) -> str:
    if measured["low"] is None:
        return f"{measured['value']:.3f}"
    return f"{measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"


def _items(path: Path) -> dict[str, Pair]:
    pairs = (item_pair(row.values, row.where) for row in read_rows(str(path), "train"))
    return {pair.item_id: pair for pair in pairs}


def _check_manifest(path: Path) -> None:
    beside = path.with_name(path.name + MANIFEST)
    if beside.is_file():
        manifest = json.loads(beside.read_text(encoding="utf-8"))
        if manifest.get("sha256") != _hash(path):
            raise ValueError(
                f"{path} is not the file that {beside.name} describes: it was changed or cut "
                "short; export it again, or remove the manifest to import it all the same"
            )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.lower()
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Nested fields differ between kinds of row: each row has every column.
        listed = list(rows)
        columns = list(dict.fromkeys(key for row in listed for key in row))
        table = pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in listed])
        pq.write_table(table, path)
        return
    if not name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: the name must end in .jsonl, .jsonl.gz or .parquet")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name.endswith(".gz"):
        # No name and no time inside, so that the same rows give the same hash.
        with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
            with io.TextIOWrapper(packed, encoding="utf-8") as file:
                file.writelines(lines)
        return
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)
