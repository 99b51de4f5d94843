"""What people are asked: tasks, and the answers they give.

A task shows one prompt with one candidate (to rate), two (to compare) or several (to rank). The
content is what is stored; the page numbers candidates by their place in it, whatever the order
in which a person sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.trajectory import Message
from reward_service.comparison import (
    Annotator,
    Candidate,
    Comparison,
    Pair,
    Ranking,
    Rating,
)
from reward_service.feedback.store import Entry, now

Kind = Literal["comparison", "rating", "ranking"]

Answer = dict[str, Any]
"""``{"choice", "strength"}``, ``{"ratings": {criterion: 1-5}}`` or ``{"ranking": [numbers]}``."""

MOST_RANKED = 9
"""Candidates of a ranking: each has a digit on the keyboard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One thing to judge.

    Example:
        >>> Task(task_id="policy:17#0-1", kind="comparison", prompt_id="17", prompt="Storm",
        ...      candidates=(Candidate(text="Rain fell."), Candidate(text="Sun.")), overlap=2)

    Attributes:
        task_id: Identity; of a comparison, the ``item_id`` of its pair.
        overlap: How many people judge it.
        priority: Higher is asked first.
        gold: The known answer, for tasks that measure the person.
        round: Round of ``rlhf loop`` that it was made in, from 1.
    """

    task_id: str
    kind: Kind
    prompt_id: str
    prompt: str
    candidates: tuple[Candidate, ...]
    messages: tuple[Message, ...] = ()
    overlap: int = 1
    priority: float = 0.0
    gold: Answer | None = field(default=None)
    round: int = 0

    def __post_init__(self) -> None:
        least, most = {"comparison": (2, 2), "rating": (1, 1), "ranking": (3, MOST_RANKED)}[
            self.kind
        ]
        if not least <= len(self.candidates) <= most:
            raise ValueError(
                f"task {self.task_id}: a {self.kind} needs {least} to {most} candidates, got "
                f"{len(self.candidates)}"
            )
        if self.overlap < 1:
            raise ValueError(f"task {self.task_id}: overlap must be at least 1")

    @property
    def content(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "messages": [dict(message) for message in self.messages],
            "candidates": [{"text": c.text, "model": c.model} for c in self.candidates],
        }

    @property
    def pair(self) -> Pair:
        """The pair of a comparison."""
        assert self.kind == "comparison"
        return Pair(
            item_id=self.task_id,
            prompt_id=self.prompt_id,
            prompt=self.prompt,
            a=self.candidates[0],
            b=self.candidates[1],
            messages=self.messages,
        )

    @property
    def shuffle(self) -> int:
        """A place in the queue among equals, the same in every process."""
        return int.from_bytes(hashlib.sha256(self.task_id.encode()).digest()[:4], "big") >> 1


def task_of_pair(
    pair: Pair,
    *,
    overlap: int = 1,
    priority: float = 0.0,
    gold: Answer | None = None,
    round_number: int = 0,
) -> Task:
    return Task(
        task_id=pair.item_id,
        kind="comparison",
        prompt_id=pair.prompt_id,
        prompt=pair.prompt,
        candidates=(pair.a, pair.b),
        messages=pair.messages,
        overlap=overlap,
        priority=priority,
        gold=gold,
        round=round_number,
    )


def task_of_judgement(judgement: Comparison | Rating | Ranking, gold: Answer | None = None) -> Task:
    """The task that a judgement from elsewhere would have been an answer to."""
    if isinstance(judgement, Comparison):
        return task_of_pair(judgement.pair, gold=gold)
    if isinstance(judgement, Rating):
        return Task(
            task_id=judgement.item_id,
            kind="rating",
            prompt_id=judgement.prompt_id,
            prompt=judgement.prompt,
            candidates=(judgement.response,),
            gold=gold,
        )
    return Task(
        task_id=judgement.item_id,
        kind="ranking",
        prompt_id=judgement.prompt_id,
        prompt=judgement.prompt,
        candidates=judgement.candidates,
        messages=judgement.messages,
        gold=gold,
    )


def row_of_task(task: Task) -> dict[str, Any]:
    """A new task as the store keeps it, open and untouched."""
    return {
        "task_id": task.task_id,
        "kind": task.kind,
        "content": task.content,
        "overlap": task.overlap,
        "priority": task.priority,
        "shuffle": task.shuffle,
        "gold": task.gold,
        "round": task.round,
        "state": "open",
        "taken": 0,
        "done": 0,
        "flags": 0,
        "created_at": now(),
    }


def task_of_row(row: Mapping[Any, Any]) -> Task:
    content = row["content"]
    return Task(
        task_id=row["task_id"],
        kind=row["kind"],
        prompt_id=content["prompt_id"],
        prompt=content["prompt"],
        candidates=tuple(Candidate(**c) for c in content["candidates"]),
        messages=tuple(content["messages"]),
        overlap=row["overlap"],
        priority=row["priority"],
        gold=row["gold"],
        round=row["round"],
    )


def checked_answer(task: Task, answer: Mapping[str, Any], criteria: Sequence[str]) -> Answer:
    """An answer of the right form, with nothing else in it.

    Raises:
        ValueError: The form of the answer does not fit the task.
    """
    if task.kind == "comparison":
        choice, strength = answer.get("choice"), answer.get("strength", 1)
        if choice not in ("a", "b", "tie", "both_bad"):
            raise ValueError(f"choice must be a, b, tie or both_bad, got {choice!r}")
        if strength not in (1, 2, 3):
            raise ValueError(f"strength must be 1, 2 or 3, got {strength!r}")
        return {"choice": choice, "strength": strength if choice in ("a", "b") else 1}
    if task.kind == "rating":
        ratings = answer.get("ratings")
        if not isinstance(ratings, Mapping) or set(ratings) != set(criteria):
            raise ValueError(f"each of {', '.join(criteria)} needs a rating")
        for criterion, value in ratings.items():
            if value not in (1, 2, 3, 4, 5):
                raise ValueError(f"{criterion}: a rating is 1 to 5, got {value!r}")
        return {"ratings": {criterion: ratings[criterion] for criterion in criteria}}
    ranking = answer.get("ranking")
    if not isinstance(ranking, Sequence) or sorted(ranking) != list(range(len(task.candidates))):
        raise ValueError(f"each of the {len(task.candidates)} texts needs a place of its own")
    return {"ranking": list(ranking)}


def entries_of(
    task: Task,
    answer: Answer,
    annotator: Annotator,
    *,
    shown: Sequence[int],
    seconds: float,
    created_at: str,
    repeat: int = 0,
    withdrawn: bool = False,
) -> list[Entry[Any]]:
    """The rows of the history that an answer becomes."""

    def entry(judgement: Comparison | Rating | Ranking) -> Entry[Any]:
        return Entry(judgement=judgement, withdrawn=withdrawn, repeat=repeat)

    if task.kind == "comparison":
        comparison = Comparison(
            pair=task.pair,
            annotator=annotator,
            choice=answer["choice"],
            strength=answer["strength"],
            shown_first="a" if shown[0] == 0 else "b",
            seconds=seconds,
            created_at=created_at,
        )
        return [entry(comparison)]
    if task.kind == "rating":
        return [
            entry(
                Rating(
                    item_id=task.task_id,
                    prompt_id=task.prompt_id,
                    prompt=task.prompt,
                    response=task.candidates[0],
                    annotator=annotator,
                    criterion=criterion,
                    value=value,
                    created_at=created_at,
                )
            )
            for criterion, value in answer["ratings"].items()
        ]
    ranking = Ranking(
        item_id=task.task_id,
        prompt_id=task.prompt_id,
        prompt=task.prompt,
        candidates=task.candidates,
        messages=task.messages,
        annotator=annotator,
        ranking=tuple(answer["ranking"]),
        seconds=seconds,
        created_at=created_at,
    )
    return [entry(ranking)]
