"""The store of judgements: round trips, idempotence, several processes, damaged files."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from actors.trajectory import Message
from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Ranking, Rating
from reward_service.config import JudgeConfig
from reward_service.feedback import schema
from reward_service.feedback.collect import (
    collect_judgements,
    given_preference,
    pairs_of_samples,
)
from reward_service.feedback.store import Entry, FeedbackStore

ANNOTATOR = Annotator(annotator_id="otter", kind="human")
PAIR = Pair(
    item_id="i1",
    prompt_id="p1",
    prompt="Sturm über 河城 🌧",
    a=Candidate(text="a\nb", model="sft"),
    b=Candidate(text="", model="ppo"),
    messages=(Message(role="user", content="hi"),),
)
COMPARISON = Comparison(
    pair=PAIR,
    annotator=ANNOTATOR,
    choice="b",
    strength=3,
    shown_first="b",
    seconds=4.25,
    created_at="2026-01-01T10:00:00+00:00",
)
RATING = Rating(
    item_id="r1",
    prompt_id="p1",
    prompt="?",
    response=Candidate(text="!", model="m"),
    annotator=ANNOTATOR,
    criterion="helpful",
    value=4,
)


def test_everything_comes_back_equal(store_location: str) -> None:
    with FeedbackStore(store_location) as store:
        assert store.add_comparisons([COMPARISON]) == 1
        assert store.add_ratings([RATING]) == 1
        assert store.add_annotators([Annotator(annotator_id="judge-1", kind="simulated")]) == 1
        assert store.add_pairs([replace(PAIR, item_id="i2")]) == 1
    with FeedbackStore(store_location) as store:
        assert store.comparisons() == [COMPARISON]
        assert store.ratings() == [RATING]
        assert [a.annotator_id for a in store.annotators()] == ["judge-1", "otter"]
        assert [p.item_id for p in store.pairs()] == ["i1", "i2"]
        assert store.pairs()[0] == PAIR


def test_adding_again_is_harmless_and_a_new_judgement_supersedes(store_location: str) -> None:
    with FeedbackStore(store_location) as store:
        assert store.add_comparisons([COMPARISON, COMPARISON]) == 1
        assert store.add_comparisons([COMPARISON]) == 0
        changed = replace(COMPARISON, choice="a", created_at="2026-01-01T11:00:00+00:00")
        assert store.add_comparisons([changed]) == 1
        assert store.comparisons() == [changed]
        assert store.comparisons(history=True) == [COMPARISON, changed]
        assert store.add_ratings([RATING, replace(RATING, criterion="true", value=1)]) == 2
        assert store.add_ratings([replace(RATING, value=2)]) == 1
        assert [(r.criterion, r.value) for r in store.ratings()] == [("true", 1), ("helpful", 2)]


def test_what_was_judged_cannot_change(store_location: str) -> None:
    with FeedbackStore(store_location) as store:
        store.add_comparisons([COMPARISON])
        other = replace(COMPARISON, pair=replace(PAIR, prompt="another"))
        fresh = replace(COMPARISON, pair=replace(PAIR, item_id="fresh"))
        with pytest.raises(ValueError, match=r"pairs: 'i1' is in .* already with another prompt"):
            store.add_comparisons([fresh, other])
        assert store.comparisons(history=True) == [COMPARISON]
        assert len(store.pairs()) == 1  # all or none
        with pytest.raises(ValueError, match="another kind"):
            store.add_annotators([Annotator(annotator_id="otter", kind="simulated")])


WRITER = """
import sys
from dataclasses import replace
from reward_service.comparison import Annotator
from reward_service.feedback.store import FeedbackStore
from tests.reward_service.test_store import COMPARISON
name = sys.argv[2]
with FeedbackStore(sys.argv[1]) as store:
    for n in range(60):
        pair = replace(COMPARISON.pair, item_id=f"item-{n % 40}")
        annotator = Annotator(annotator_id=name, kind="human")
        store.add_comparisons([replace(COMPARISON, pair=pair, annotator=annotator, seconds=n)])
"""


def test_processes_write_at_once_and_nothing_is_lost(store_location: str) -> None:
    path = store_location
    root = Path(__file__).resolve().parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, name], cwd=root)
        for name in ("otter", "heron", "lynx")
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    with FeedbackStore(path) as store:
        assert len(store.comparisons(history=True)) == 180
        assert len(store.comparisons()) == 120
        assert len(store.pairs()) == 40
    if "://" not in path:
        with sqlite3.connect(path) as raw:
            assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_files_that_are_no_store_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, certainly not, " * 100)
    with pytest.raises(ValueError, match=r"notes.txt cannot be opened.*not a database"):
        FeedbackStore(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as raw:
        raw.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(ValueError, match=r"holds other tables \(recipes"):
        FeedbackStore(other)
    later = tmp_path / "later.sqlite"
    FeedbackStore(later).close()
    with sqlite3.connect(later) as raw:
        raw.execute("UPDATE alembic_version SET version_num = 'r0099'")
    with pytest.raises(ValueError, match=r"revision 'r0099'.*knows r0001, r0002"):
        FeedbackStore(later)


def test_a_password_in_the_url_is_not_shown(tmp_path: Path) -> None:
    url = f"sqlite://user:hunter2@/{tmp_path / 'x.sqlite'}"
    with pytest.raises(ValueError, match="check the URL") as caught:
        FeedbackStore(url)
    assert "hunter2" not in str(caught.value)


def test_collection_is_repeatable_and_stores_once(tmp_path: Path) -> None:
    pairs = [
        replace(PAIR, item_id=f"i{n}", prompt_id=f"p{n}", a=Candidate(text="x" * n))
        for n in range(30)
    ]
    config = JudgeConfig(judges=5, judgements_per_pair=3)
    calls: list[tuple[int, int]] = []

    def quality(prompt_id: str, text: str) -> float:
        return len(text) / 30

    with FeedbackStore(tmp_path / "f.sqlite") as store:
        partly = collect_judgements(pairs[:10], quality, config, store, seed=1)
        whole = collect_judgements(
            pairs, quality, config, store, seed=1, on_progress=lambda *a: calls.append(a)
        )
        assert whole[:30] == partly
        assert store.comparisons(history=True) == whole
    assert len(whole) == 90
    assert calls[-1] == (30, 30)


def test_samples_are_paired_whatever_their_order(trajectory) -> None:
    samples = []
    for number in range(3):
        for index in range(4):
            base = trajectory(f" text {number} {index}", number=number)
            samples.append(replace(base, sample_index=index))
    samples[1] = replace(samples[1], response_text=samples[0].response_text)
    pairs = pairs_of_samples(reversed(samples), model="sft")
    assert [p.item_id for p in pairs] == [
        "sft:p1#0-1",
        "sft:p2#0-1",
        "sft:p0#2-3",
        "sft:p1#2-3",
        "sft:p2#2-3",
    ]
    assert pairs[0].a.text == " text 1 0"
    assert pairs[0].a.model == "sft"
    assert pairs_of_samples(samples, model="sft", count=2) == pairs[:2]


def test_given_preferences_do_not_always_prefer_a() -> None:
    made = [
        given_preference(
            item_id=f"i{n}", prompt="p", chosen="good", rejected="bad", annotator=ANNOTATOR
        )
        for n in range(40)
    ]
    for comparison in made:
        winner = comparison.pair.a if comparison.choice == "a" else comparison.pair.b
        assert winner.text == "good"
    assert {c.choice for c in made} == {"a", "b"}


def test_what_is_taken_back_no_longer_counts_but_stays_on_record(store_location: str) -> None:
    with FeedbackStore(store_location) as store:
        store.add_history([Entry(judgement=COMPARISON), Entry(judgement=RATING)])
        store.add_history([Entry(judgement=COMPARISON, withdrawn=True)])
        assert store.comparisons() == []
        assert [e.withdrawn for e in store.comparison_history()] == [False, True]
        again = replace(COMPARISON, choice="tie", created_at="2026-01-02T10:00:00+00:00")
        second_look = replace(COMPARISON, choice="a", created_at="2026-01-03T10:00:00+00:00")
        store.add_history([Entry(judgement=again), Entry(judgement=second_look, repeat=1)])
        assert store.comparisons() == [again]  # the second look measures the person
        assert [e.repeat for e in store.comparison_history()] == [0, 0, 0, 1]
        assert store.ratings() == [RATING]


def test_a_ranking_implies_comparisons() -> None:
    ranking = Ranking(
        item_id="t",
        prompt_id="p",
        prompt="?",
        candidates=tuple(Candidate(text=t) for t in ("x", "y", "z", "x")),
        annotator=ANNOTATOR,
        ranking=(2, 0, 1, 3),
    )
    said = {
        c.pair.item_id: (c.pair.a.text if c.choice == "a" else c.pair.b.text, c.strength)
        for c in ranking.comparisons()
    }
    # best first: z, x, y, x; the two equal texts (0 and 3) make no pair
    assert said == {
        "t#0-1": ("x", 1), "t#0-2": ("z", 1), "t#1-2": ("z", 2), "t#1-3": ("y", 1),
        "t#2-3": ("z", 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match="each of the 4 candidates once"):
        replace(ranking, ranking=(0, 1, 2, 2))


# The tables as version 0.1.0 made them, with one judgement.
OLD = """
CREATE TABLE feedback_schema (version INTEGER NOT NULL PRIMARY KEY);
CREATE TABLE annotators (annotator_id VARCHAR(128) NOT NULL PRIMARY KEY,
  kind VARCHAR(16) NOT NULL);
CREATE TABLE pairs (item_id VARCHAR(256) NOT NULL PRIMARY KEY, prompt_id VARCHAR(256) NOT NULL,
  prompt TEXT NOT NULL, messages JSON NOT NULL, a_text TEXT NOT NULL,
  a_model VARCHAR(256) NOT NULL, b_text TEXT NOT NULL, b_model VARCHAR(256) NOT NULL);
CREATE TABLE comparisons (number INTEGER NOT NULL PRIMARY KEY, "key" VARCHAR(64) NOT NULL UNIQUE,
  item_id VARCHAR(256) NOT NULL REFERENCES pairs (item_id),
  annotator_id VARCHAR(128) NOT NULL REFERENCES annotators (annotator_id),
  choice VARCHAR(16) NOT NULL, strength INTEGER NOT NULL, shown_first VARCHAR(1) NOT NULL,
  seconds FLOAT NOT NULL, created_at VARCHAR(40) NOT NULL, stored_at VARCHAR(40) NOT NULL);
CREATE TABLE ratings (number INTEGER NOT NULL PRIMARY KEY, "key" VARCHAR(64) NOT NULL UNIQUE,
  item_id VARCHAR(256) NOT NULL, prompt_id VARCHAR(256) NOT NULL, prompt TEXT NOT NULL,
  response TEXT NOT NULL, model VARCHAR(256) NOT NULL,
  annotator_id VARCHAR(128) NOT NULL REFERENCES annotators (annotator_id),
  criterion VARCHAR(128) NOT NULL, value INTEGER NOT NULL, created_at VARCHAR(40) NOT NULL,
  stored_at VARCHAR(40) NOT NULL);
INSERT INTO feedback_schema VALUES (1);
INSERT INTO annotators VALUES ('otter', 'human');
INSERT INTO pairs VALUES ('i', 'p', '?', '[]', 'x', '', 'y', '');
INSERT INTO comparisons VALUES (1,
  'fe6c6f5c6d64d3d9fb3d1ca1ef2c3ad9a9d2bbff1ef9f5dba0b35e0a2d8a4bd3',
  'i', 'otter', 'a', 2, 'b', 1.5, '2026-01-01', '2026-01-01');
"""


def test_a_store_of_the_first_version_is_migrated_and_keeps_its_judgements(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    pair = Pair(
        item_id="i", prompt_id="p", prompt="?", a=Candidate(text="x"), b=Candidate(text="y")
    )
    kept = replace(
        COMPARISON, pair=pair, choice="a", strength=2, seconds=1.5, created_at="2026-01-01"
    )
    key = (
        '{"annotator_id": "otter", "choice": "a", "created_at": "2026-01-01", "item_id": "i", '
        '"seconds": 1.5, "shown_first": "b", "strength": 2}'
    )
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(OLD)
        raw.execute("UPDATE comparisons SET key = ?", [sha256(key.encode()).hexdigest()])
        raw.commit()
    with FeedbackStore(path) as store:
        assert store.comparisons() == [kept]
        assert store.add_comparisons([kept]) == 0, "the same judgement has the same key"
    FeedbackStore(path).close()


def test_the_revisions_make_the_tables_that_the_program_expects(store_location: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(schema.__file__).parent / "migrations"))
    assert script.get_heads() == [schema.HEAD]
    assert script.get_bases() == [schema.FIRST]
    with FeedbackStore(store_location) as store:
        differences = store.database.read(
            lambda c: compare_metadata(MigrationContext.configure(c), schema.metadata)
        )
    assert differences == []


def test_a_vote_of_unknown_order_that_was_taken_for_a_first_is_not_stored_twice(
    store_location: str,
) -> None:
    pair = Pair(
        item_id="1", prompt_id="1", prompt="?", a=Candidate(text="x"), b=Candidate(text="y")
    )
    vote = Comparison(pair=pair, annotator=Annotator(annotator_id="u", kind="human"), choice="b")
    with FeedbackStore(store_location) as store:
        assert store.add_comparisons([replace(vote, shown_first="a")]) == 1  # as it was before
        assert store.add_comparisons([vote]) == 0
        assert store.add_comparisons([replace(vote, shown_first="b")]) == 1
    with FeedbackStore(
        store_location + "x" if "://" not in store_location else store_location
    ) as new:
        later = replace(vote, created_at="2026-01-01T00:00:00+00:00")
        assert new.add_comparisons([later]) == 1
        assert new.add_comparisons([later]) == 0
        assert new.add_comparisons([replace(later, shown_first="a")]) == 1, "the order is known now"
