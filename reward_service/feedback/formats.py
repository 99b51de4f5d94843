"""Judgements as rows of files, in four formats, both ways.

``votes``       this project's own: one row a judgement, with its history. Also what reads raw
                votes of others: an item, a person, a choice.
``trl``         TRL's preference format: prompt, chosen, rejected; messages where the item has them
``openrlhf``    OpenRLHF's: chosen and rejected as whole dialogues
``items``       what is to be judged: pairs, texts to rate, texts to rank
``gold``        the same with the known answer, to measure people by
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from actors.trajectory import Message
from reward_service.comparison import (
    Annotator,
    Candidate,
    Choice,
    Comparison,
    Pair,
    Ranking,
    Rating,
)
from reward_service.feedback.collect import given_preference
from reward_service.feedback.store import Entry
from reward_service.feedback.tasks import (
    Answer,
    Task,
    checked_answer,
    task_of_judgement,
    task_of_pair,
)

Format = Literal["votes", "trl", "openrlhf"]
"""Formats of judgements; ``items`` and ``gold`` are read into tasks."""
Values = Mapping[str, Any]

_CHOICES: Mapping[str, Choice] = {
    "a": "a", "b": "b", "tie": "tie", "both_bad": "both_bad", "both bad": "both_bad",
    "1": "a", "2": "b", "0": "tie", "model_a": "a", "model_b": "b", "tie (bothbad)": "both_bad",
}  # fmt: skip
"""Words of other files for a choice; 0, 1, 2 as PandaLM has them."""


def entry_row(entry: Entry[Any], gold: Answer | None = None) -> dict[str, Any]:
    """A judgement as a flat row; every field of ``row_entry``.

    Args:
        gold: The known answer of its item, if it has one: then ``row_gold`` finds it.
    """
    said = entry.judgement
    row: dict[str, Any] = {
        "annotator_id": said.annotator.annotator_id,
        "annotator_kind": said.annotator.kind,
        "created_at": said.created_at,
        "withdrawn": entry.withdrawn,
        "repeat": entry.repeat,
    }
    if gold is not None:
        row["gold"] = gold
    if isinstance(said, Comparison):
        return {"kind": "comparison", **_pair_values(said.pair), **row} | {
            "choice": said.choice,
            "strength": said.strength,
            "shown_first": said.shown_first,
            "seconds": said.seconds,
        }
    common = {"item_id": said.item_id, "prompt_id": said.prompt_id, "prompt": said.prompt}
    if isinstance(said, Rating):
        return {"kind": "rating", **common, **row} | {
            "response": said.response.text,
            "model": said.response.model,
            "criterion": said.criterion,
            "value": said.value,
        }
    return {"kind": "ranking", **common, **row} | {
        "messages": [dict(m) for m in said.messages],
        "candidates": [{"text": c.text, "model": c.model} for c in said.candidates],
        "ranking": list(said.ranking),
        "seconds": said.seconds,
    }


def row_entry(row: Values, items: Mapping[str, Pair], where: str) -> Entry[Any]:
    """The judgement of a row: our own, or somebody's raw vote.

    Args:
        row: Of a raw vote ``item_id`` and ``annotator_id`` (or rater, annotator, judge),
            ``choice`` (or vote, label), and the texts, unless ``items`` has them.
        items: Pairs of a separate file, by their id.
        where: The row's place, for messages.

    Raises:
        ValueError: A field is missing or has no meaning; the message begins with ``where``.
    """
    kind = row.get("kind", "comparison")
    try:
        if kind == "comparison":
            judgement: Comparison | Rating | Ranking = _comparison(row, items)
        elif kind == "rating":
            judgement = _rating(row)
        elif kind == "ranking":
            judgement = _ranking(row)
        else:
            raise ValueError(f"kind must be comparison, rating or ranking, got {kind!r}")
        return Entry(
            judgement=judgement,
            withdrawn=_truth(row, "withdrawn"),
            repeat=int(row.get("repeat") or 0),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def row_gold(row: Values, entry: Entry[Any], where: str) -> Answer | None:
    """The known answer of the item that a row of ours is about, ``None`` for ordinary items.

    Raises:
        ValueError: The answer does not fit the item; the message begins with ``where``.
    """
    given = row.get("gold")
    if not given:
        return None
    try:
        if not isinstance(given, Mapping):
            raise ValueError(f"gold must be an answer, got {given!r}")
        # Parquet gives every row the fields of all, empty.
        answer = {name: value for name, value in given.items() if value is not None}
        if "ratings" in answer:
            answer["ratings"] = {c: v for c, v in answer["ratings"].items() if v is not None}
        criteria = list(answer.get("ratings", ()))
        return checked_answer(task_of_judgement(entry.judgement), answer, criteria)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: the known answer (gold): {error}") from None


def item_task(
    row: Values, where: str, *, gold: bool, overlap: int, criteria: Sequence[str]
) -> Task:
    """A row of a file of items, or of gold items, as a task.

    Args:
        row: A pair (a, b); with ``kind`` rating a response, with ``kind`` ranking candidates. A
            gold item has its answer besides: choice, ``ratings`` {criterion: 1-5}, or ranking.

    Raises:
        ValueError: A field is missing or has no meaning; the message begins with ``where``.
    """
    kind = row.get("kind", "comparison")
    answer: Answer = {}
    try:
        if kind == "comparison":
            task = task_of_pair(_pair(row), overlap=overlap)
            if gold:
                answer = {"choice": _choice(row)}
        elif kind in ("rating", "ranking"):
            prompt, messages = _text(row, "prompt", "instruction"), _dialogue(row)
            task = Task(
                task_id=_text(row, "item_id", "id"),
                kind=kind,
                prompt_id=_prompt_id(row),
                prompt=prompt,
                messages=messages,
                candidates=(_response(row),) if kind == "rating" else _candidates(row),
                overlap=overlap,
            )
            if gold:
                name = "ratings" if kind == "rating" else "ranking"
                answer = {name: _first(row, name)}
        else:
            raise ValueError(f"kind must be comparison, rating or ranking, got {kind!r}")
        return replace(task, gold=checked_answer(task, answer, criteria)) if gold else task
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def item_pair(row: Values, where: str) -> Pair:
    """A pair of a file of items. Raises ValueError that begins with ``where``."""
    try:
        return _pair(row)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def preference_row(row: Values, where: str, *, item_id: str, annotator: Annotator) -> Comparison:
    """A row of TRL's or OpenRLHF's preference format, explicit or implicit prompt.

    Raises:
        ValueError: chosen or rejected is missing, equal, or they answer different prompts.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    prompt = next((row[k] for k in ("prompt", "input", "question") if row.get(k)), None)
    try:
        good_before, good = _split(chosen, "chosen")
        bad_before, bad = _split(rejected, "rejected")
        if prompt is None and good_before != bad_before:
            raise ValueError("chosen and rejected answer different prompts")
        if isinstance(prompt, list):
            messages = _messages(prompt)
        elif prompt is not None:
            messages = ()
        else:
            messages = good_before
            if not messages:
                raise ValueError("there is no prompt: give a field `prompt`, or whole dialogues")
        if good == bad:
            raise ValueError("chosen and rejected are equal")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    text = prompt if isinstance(prompt, str) else messages[-1]["content"]
    return given_preference(
        item_id=item_id,
        prompt_id=_optional(row, "prompt_id"),
        prompt=text,
        messages=messages,
        chosen=good,
        rejected=bad,
        annotator=annotator,
    )


def preference_rows(comparisons: Iterable[Comparison], form: Format) -> Iterator[dict[str, Any]]:
    """One row a pair that most of its judges decide; ties say nothing in these formats."""
    by_item: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_item.setdefault(comparison.pair.item_id, []).append(comparison)
    for item_id, votes in by_item.items():
        lead = sum((c.choice == "a") - (c.choice == "b") for c in votes)
        if lead == 0:
            continue
        pair = votes[0].pair
        good, bad = (pair.a.text, pair.b.text) if lead > 0 else (pair.b.text, pair.a.text)
        messages: list[Message] = [*pair.messages]
        ids = {"id": item_id, "prompt_id": pair.prompt_id}
        if form == "openrlhf":
            before = messages or [Message(role="user", content=pair.prompt)]
            yield ids | {
                "chosen": [*before, Message(role="assistant", content=good)],
                "rejected": [*before, Message(role="assistant", content=bad)],
            }
        elif messages:
            yield ids | {
                "prompt": messages,
                "chosen": [Message(role="assistant", content=good)],
                "rejected": [Message(role="assistant", content=bad)],
            }
        else:
            yield ids | {"prompt": pair.prompt, "chosen": good, "rejected": bad}


def _split(value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    """(what came before, the answer) of a text or a dialogue that ends with the assistant."""
    if isinstance(value, str) and value:
        return (), value
    if isinstance(value, list) and value:
        messages = _messages(value)
        if messages[-1]["role"] == "assistant":
            return messages[:-1], messages[-1]["content"]
        raise ValueError(f"{name} must end with a message of the assistant")
    raise ValueError(f"{name} must be a text or a list of messages")


def _messages(value: Sequence[Any]) -> tuple[Message, ...]:
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError("a message must have a role and a content")
    return tuple(Message(role=str(m["role"]), content=m["content"]) for m in value)


def _dialogue(row: Values) -> tuple[Message, ...]:
    return _messages(row.get("messages") or ())


def _prompt_id(row: Values) -> str:
    """Its own or, as learning tells prompts apart by what they show, the item's."""
    return _optional(row, "prompt_id") or _text(row, "item_id", "id")


def _pair_values(pair: Pair) -> dict[str, Any]:
    return {
        "item_id": pair.item_id,
        "prompt_id": pair.prompt_id,
        "prompt": pair.prompt,
        "messages": [dict(m) for m in pair.messages],
        "a": pair.a.text,
        "a_model": pair.a.model,
        "b": pair.b.text,
        "b_model": pair.b.model,
    }


def _pair(row: Values) -> Pair:
    messages = _dialogue(row)
    prompt = _text(row, "prompt", "instruction")
    if row.get("input"):  # of instruction data: what the instruction is about
        prompt = f"{prompt}\n\n{row['input']}"
    return Pair(
        item_id=_text(row, "item_id", "id"),
        prompt_id=_prompt_id(row),
        prompt=prompt,
        a=Candidate(text=_text(row, "a", "response_a"), model=_optional(row, "a_model", "model_a")),
        b=Candidate(text=_text(row, "b", "response_b"), model=_optional(row, "b_model", "model_b")),
        messages=messages,
    )


def _comparison(row: Values, items: Mapping[str, Pair]) -> Comparison:
    item_id = _text(row, "item_id", "id")
    return Comparison(
        pair=items[item_id] if item_id in items else _pair(row),
        annotator=_annotator(row),
        choice=_choice(row),
        strength=int(row.get("strength") or 1),
        shown_first=_optional(row, "shown_first"),  # type: ignore[arg-type]  # checked there
        seconds=float(row.get("seconds") or 0.0),
        created_at=_optional(row, "created_at"),
    )


def _choice(row: Values) -> Choice:
    given = str(_first(row, "choice", "vote", "label")).strip().lower()
    if given not in _CHOICES:
        raise ValueError(f"choice must be a, b, tie or both_bad, got {given!r}")
    return _CHOICES[given]


def _response(row: Values) -> Candidate:
    return Candidate(text=_text(row, "response", "text"), model=_optional(row, "model"))


def _candidates(row: Values) -> tuple[Candidate, ...]:
    """Texts, or objects with a text and perhaps a model."""
    given = _first(row, "candidates")
    if not isinstance(given, list) or not all(isinstance(c, str | Mapping) for c in given):
        raise ValueError("candidates must be a list of texts, or of objects with a text")
    values = [{"text": c} if isinstance(c, str) else c for c in given]
    return tuple(Candidate(text=_text(c, "text"), model=_optional(c, "model")) for c in values)


def _rating(row: Values) -> Rating:
    prompt = _text(row, "prompt", "instruction")
    return Rating(
        item_id=_text(row, "item_id", "id"),
        prompt_id=_prompt_id(row),
        prompt=prompt,
        response=_response(row),
        annotator=_annotator(row),
        criterion=_optional(row, "criterion") or "quality",
        value=int(_first(row, "value", "rating", "score")),
        created_at=_optional(row, "created_at"),
    )


def _ranking(row: Values) -> Ranking:
    prompt, messages = _text(row, "prompt"), _dialogue(row)
    return Ranking(
        item_id=_text(row, "item_id", "id"),
        prompt_id=_prompt_id(row),
        prompt=prompt,
        messages=messages,
        candidates=_candidates(row),
        annotator=_annotator(row),
        ranking=tuple(int(n) for n in _first(row, "ranking")),
        seconds=float(row.get("seconds") or 0.0),
        created_at=_optional(row, "created_at"),
    )


def _annotator(row: Values) -> Annotator:
    name = str(_first(row, "annotator_id", "annotator", "rater", "judge"))
    kind = row.get("annotator_kind") or "human"
    if kind not in ("human", "simulated"):
        raise ValueError(f"annotator_kind must be human or simulated, got {kind!r}")
    return Annotator(annotator_id=name, kind="simulated" if kind == "simulated" else "human")


def _first(row: Values, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"the row has no {names[0]}")


def _text(row: Values, *names: str) -> str:
    value = _first(row, *names)
    if not isinstance(value, str | int):
        raise ValueError(f"{names[0]} must be a text, got {type(value).__name__}")
    return str(value)


def _truth(row: Values, name: str) -> bool:
    """CSV has texts only, and every text that is not empty would be true."""
    given = _optional(row, name).strip().lower()
    if given not in ("", "0", "false", "no", "1", "true", "yes"):
        raise ValueError(f"{name} must be true or false, got {row[name]!r}")
    return given in ("1", "true", "yes")


def _optional(row: Values, *names: str) -> str:
    return next((str(row[name]) for name in names if row.get(name) is not None), "")
