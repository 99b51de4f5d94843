"""Records of judgement: who compared or rated what, and what they said.

People's judgements and simulated judges' go through the same records and the same store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from actors.trajectory import Message

Shown = tuple[str, str, Sequence[Message]]
"""(prompt_id, prompt, messages): what an item shows before its candidates."""

Choice = Literal["a", "b", "tie", "both_bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotator:
    """Somebody who judges, known by a pseudonym only."""

    annotator_id: str
    kind: Literal["human", "simulated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One response to a prompt and where it came from."""

    text: str
    model: str = ""
    """Name of the checkpoint that wrote it; never shown to annotators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An item to compare: one prompt, two responses."""

    item_id: str
    prompt_id: str
    prompt: str
    a: Candidate
    b: Candidate
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One annotator's judgement of one pair.

    ``choice`` is in terms of the pair's own a and b, whatever order they were shown in;
    ``shown_first`` records that order, so that position bias can be measured; it is empty where the
    order is unknown.
    """

    pair: Pair
    annotator: Annotator
    choice: Choice
    strength: int = 1
    """1 slightly, 2 clearly, 3 far better; ignored for ties."""
    shown_first: Literal["a", "b", ""] = ""
    seconds: float = 0.0
    """How long the judgement took."""
    created_at: str = ""
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        if self.strength not in (1, 2, 3):
            raise ValueError(f"item {self.pair.item_id}: strength must be 1, 2 or 3")
        if self.shown_first not in ("a", "b", ""):
            raise ValueError(
                f"item {self.pair.item_id}: shown_first must be a, b or empty (unknown), got "
                f"{self.shown_first!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledText:
    """A text that somebody flagged as offensive or harmful, or did not."""

    text_id: str
    text: str
    flagged: bool
    prompt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rating:
    """One annotator's 1-5 rating of one response on one criterion."""

    item_id: str
    prompt_id: str
    prompt: str
    response: Candidate
    annotator: Annotator
    criterion: str
    value: int
    created_at: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.value <= 5:
            raise ValueError(f"item {self.item_id}: a rating is 1 to 5, got {self.value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """One annotator's order of several responses to one prompt."""

    item_id: str
    prompt_id: str
    prompt: str
    candidates: tuple[Candidate, ...]
    annotator: Annotator
    ranking: tuple[int, ...]
    """Numbers of the candidates, best first."""
    messages: tuple[Message, ...] = ()
    seconds: float = 0.0
    created_at: str = ""

    def __post_init__(self) -> None:
        if sorted(self.ranking) != list(range(len(self.candidates))):
            raise ValueError(
                f"item {self.item_id}: a ranking names each of the {len(self.candidates)} "
                f"candidates once, got {list(self.ranking)}"
            )

    def comparisons(self) -> list[Comparison]:
        """The n (n - 1) / 2 comparisons that the order implies (Ouyang et al. 2022, section 3.5).

        Strength grows with the distance in the order. Equal texts make no pair.
        """
        place = {number: rank for rank, number in enumerate(self.ranking)}
        implied = []
        for first, second in combinations(range(len(self.candidates)), 2):
            a, b = self.candidates[first], self.candidates[second]
            if a.text == b.text:
                continue
            pair = Pair(
                item_id=f"{self.item_id}#{first}-{second}",
                prompt_id=self.prompt_id,
                prompt=self.prompt,
                a=a,
                b=b,
                messages=self.messages,
            )
            distance = place[second] - place[first]
            implied.append(
                Comparison(
                    pair=pair,
                    annotator=self.annotator,
                    choice="a" if distance > 0 else "b",
                    strength=min(3, abs(distance)),
                    seconds=self.seconds,
                    created_at=self.created_at,
                )
            )
        return implied


def prompt_groups(shown: Iterable[Shown]) -> list[str]:
    """For each item, the id of the group of items that are of one prompt.

    Items belong together when their ids say so or when they show the same; files that give no
    ``prompt_id`` have another one for each item. What is split or resampled is these groups. Data
    that is all about one prompt or two (a fixed instruction) cannot be split by what it shows: then
    the ids alone count.
    """
    shown = list(shown)
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    nodes = []
    for prompt_id, prompt, messages in shown:
        nodes.append(("id", prompt_id))
        # Of a dialogue, the prompt is only its last turn.
        content = repr([dict(m) for m in messages]) if messages else prompt
        mine, theirs = root(nodes[-1]), root(("dialogue" if messages else "prompt", content))
        if theirs[0] == "id":
            parent[mine] = theirs
        else:
            parent[theirs] = mine
    groups = [root(node)[1] for node in nodes]
    return groups if len(set(groups)) >= 3 else [prompt_id for prompt_id, _, _ in shown]
