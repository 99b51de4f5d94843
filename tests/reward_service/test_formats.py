"""Rows of files: what a row without a field means, and which fields have several forms."""

from __future__ import annotations

from typing import Any

import pytest

from reward_service.comparison import Annotator
from reward_service.feedback.agreement_report import agreement_report
from reward_service.feedback.formats import preference_row, preference_rows, row_entry

VOTE: dict[str, Any] = {
    "item_id": "1", "annotator_id": "otter", "choice": "a", "prompt": "Storm?", "a": "x", "b": "y",
}  # fmt: skip
RANKING: dict[str, Any] = {
    "kind": "ranking", "item_id": "k", "annotator_id": "otter", "prompt": "Storm?",
    "candidates": ["x", "y", "z"], "ranking": [1, 2, 0],
}  # fmt: skip
RATING: dict[str, Any] = {
    "kind": "rating", "item_id": "r", "annotator_id": "otter", "prompt": "Storm?",
    "response": "x", "value": 4,
}  # fmt: skip


def said(row: dict[str, Any], **changes: Any) -> Any:
    return row_entry({**row, **changes}, {}, "f:1").judgement


def test_a_prompt_id_is_exported_and_read_back() -> None:
    first = said(VOTE, prompt_id=7)
    assert first.pair.prompt_id == "7"
    otter = Annotator(annotator_id="otter", kind="human")
    for form in ("trl", "openrlhf"):
        (row,) = preference_rows([first], form)  # type: ignore[arg-type]
        again = preference_row(row, "f:1", item_id=row["id"], annotator=otter)
        assert again.pair.prompt_id == "7"
    assert said(VOTE).pair.prompt_id == VOTE["item_id"]


def test_an_unknown_order_is_no_evidence_of_bias() -> None:
    votes = [said(VOTE, item_id=str(n)) for n in range(9)]
    assert {vote.shown_first for vote in votes} == {""}
    assert {c.shown_first for c in said(RANKING).comparisons()} == {""}
    report = agreement_report(votes)
    assert report["per_judge"][0]["first_share"] is None
    known = [*votes, said(VOTE, item_id="x", shown_first="b")]
    assert agreement_report(known)["per_judge"][0]["first_share"]["n"] == 1
    with pytest.raises(ValueError, match=r"f:1: item 1: shown_first must be a, b or empty"):
        said(VOTE, shown_first="left")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("False", False), ("0", False), ("", False), (None, False), (False, False), (0, False),
     ("True", True), ("1", True), (True, True)],
)  # fmt: skip
def test_withdrawn_may_be_a_text(given: object, meant: bool) -> None:
    assert row_entry({**VOTE, "withdrawn": given}, {}, "f:1").withdrawn is meant


def test_what_has_no_meaning_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"f:1: withdrawn must be true or false, got 'perhaps'"):
        row_entry({**VOTE, "withdrawn": "perhaps"}, {}, "f:1")
    for wrong in ("xyz", [1, 2, 3], 7):
        with pytest.raises(ValueError, match=r"f:1: candidates must be a list of texts"):
            said(RANKING, candidates=wrong)


def test_candidates_may_be_texts_or_objects() -> None:
    plain = said(RANKING)
    assert [c.text for c in plain.candidates] == ["x", "y", "z"]
    named = said(RANKING, candidates=[{"text": "x", "model": "m"}, "y", {"text": "z"}])
    assert [(c.text, c.model) for c in named.candidates] == [("x", "m"), ("y", ""), ("z", "")]
