"""Imports: items that are known with other content, and people who were erased."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Ranking
from reward_service.config import PeopleConfig
from reward_service.feedback.assignment import Assignments
from reward_service.feedback.erasure import erase
from reward_service.feedback.store import Entry, FeedbackStore
from reward_service.feedback.tasks import Task
from reward_service.feedback.transfer import Imported, import_entries

RANKED = Ranking(
    item_id="k", prompt_id="p", prompt="?",
    candidates=tuple(Candidate(text=text) for text in "xyz"),
    annotator=Annotator(annotator_id="otter", kind="human"), ranking=(2, 0, 1),
)  # fmt: skip


def add(store: FeedbackStore, *said: Comparison | Ranking, **options: Any) -> Imported:
    entries = [Entry(judgement=judgement) for judgement in said]
    return import_entries(store, entries, manifest_hash="h", form="votes", **options)


def test_a_ranking_of_other_texts_under_a_known_id_is_refused(store_location: str) -> None:
    heron = Annotator(annotator_id="heron", kind="human")
    texts = tuple(Candidate(text=text) for text in "xyzu")
    others = {
        "prompt": replace(RANKED, annotator=heron, prompt="!"),
        "messages": replace(RANKED, annotator=heron, messages=({"role": "user", "content": "?"},)),
        "candidates": replace(RANKED, annotator=heron, candidates=texts, ranking=(0, 1, 2, 3)),
    }
    with FeedbackStore(store_location) as store:
        for other in others.values():
            with pytest.raises(ValueError, match="use a new id"):
                add(store, RANKED, other)  # in one import
        assert add(store, RANKED).new == 1
        for name, other in others.items():
            with pytest.raises(ValueError, match=f"'k' is in .* already with another {name}: what"):
                add(store, other)
        assert add(store, RANKED, replace(RANKED, annotator=heron)).new == 1
        assert [r.annotator.annotator_id for r in store.rankings()] == ["otter", "heron"]
        rating = Task(task_id="r", kind="rating", prompt_id="p", prompt="?", candidates=(texts[0],))
        Assignments(store, PeopleConfig()).add_tasks([rating])
        with pytest.raises(ValueError, match=r"'r' is in .* already with another kind"):
            add(store, replace(RANKED, item_id="r"))
        assert len(store.rankings()) == 2


@pytest.mark.parametrize("masked_before", [True, False])
@pytest.mark.parametrize("masked_after", [True, False])
def test_an_erased_person_stays_away_under_either_name(
    store_location: str, masked_before: bool, masked_after: bool
) -> None:
    pair = Pair(
        item_id="1", prompt_id="p", prompt="?", a=Candidate(text="x"), b=Candidate(text="y")
    )
    ana = Annotator(annotator_id="ana@example.org", kind="human")
    said = Comparison(pair=pair, annotator=ana, choice="a")
    with FeedbackStore(store_location) as store:
        add(store, said, masking=masked_before)
        (stored,) = store.annotators()
        assert stored.annotator_id.startswith("person-") == masked_before
        erase(store, stored.annotator_id)
        found = add(store, said, masking=masked_after)
        assert (found.new, found.left_out) == (0, 1)
        assert store.annotators() == []
