"""The store of judgements: round trips, idempotence, several processes, damaged files."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors.trajectory import Message
from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Rating
from reward_service.config import JudgeConfig
from reward_service.feedback.collect import (
    collect_judgements,
    given_preference,
    pairs_of_samples,
)
from reward_service.feedback.store import FeedbackStore

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


def test_everything_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    with FeedbackStore(path) as store:
        assert store.add_comparisons([COMPARISON]) == 1
        assert store.add_ratings([RATING]) == 1
        assert store.add_annotators([Annotator(annotator_id="judge-1", kind="simulated")]) == 1
        assert store.add_pairs([replace(PAIR, item_id="i2")]) == 1
    with FeedbackStore(str(path)) as store:
        assert store.comparisons() == [COMPARISON]
        assert store.ratings() == [RATING]
        assert [a.annotator_id for a in store.annotators()] == ["judge-1", "otter"]
        assert [p.item_id for p in store.pairs()] == ["i1", "i2"]
        assert store.pairs()[0] == PAIR


def test_adding_again_is_harmless_and_a_new_judgement_supersedes(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        assert store.add_comparisons([COMPARISON, COMPARISON]) == 1
        assert store.add_comparisons([COMPARISON]) == 0
        changed = replace(COMPARISON, choice="a", created_at="2026-01-01T11:00:00+00:00")
        assert store.add_comparisons([changed]) == 1
        assert store.comparisons() == [changed]
        assert store.comparisons(history=True) == [COMPARISON, changed]
        assert store.add_ratings([RATING, replace(RATING, criterion="true", value=1)]) == 2
        assert store.add_ratings([replace(RATING, value=2)]) == 1
        assert [(r.criterion, r.value) for r in store.ratings()] == [("true", 1), ("helpful", 2)]


def test_what_was_judged_cannot_change(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.sqlite") as store:
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
from pathlib import Path
from reward_service.comparison import Annotator
from reward_service.feedback.store import FeedbackStore
from tests.reward_service.test_store import COMPARISON
name = sys.argv[2]
with FeedbackStore(Path(sys.argv[1])) as store:
    for n in range(60):
        pair = replace(COMPARISON.pair, item_id=f"item-{n % 40}")
        annotator = Annotator(annotator_id=name, kind="human")
        store.add_comparisons([replace(COMPARISON, pair=pair, annotator=annotator, seconds=n)])
"""


def test_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite"
    root = Path(__file__).resolve().parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=root)
        for name in ("otter", "heron", "lynx")
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    with FeedbackStore(path) as store:
        assert len(store.comparisons(history=True)) == 180
        assert len(store.comparisons()) == 120
        assert len(store.pairs()) == 40
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
        raw.execute("UPDATE feedback_schema SET version = 99")
    with pytest.raises(ValueError, match="schema version 99"):
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
