"""Judgement by people: tasks from the policy into the store, then waiting for the page to fill it.

The page is a process of its own (``rlhf collect --serve``): it outlives Ray and vLLM, which are
ended before the wait begins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actors.trajectory import Trajectory
from cluster.stages import Workplace
from cluster.stop import Stopped
from reward_service.comparison import Candidate, Pair
from reward_service.config import CollectConfig
from reward_service.feedback.agreement_report import store_report
from reward_service.feedback.assignment import Assignments, open_answers
from reward_service.feedback.presidio import scanner_of
from reward_service.feedback.selection import most_uncertain, uncertainty
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.tasks import Task, task_of_pair
from reward_service.feedback.transfer import masked_task
from reward_service.score import ScoreItem

if TYPE_CHECKING:
    from reward_service.model import RewardModel

POLL_S = 2.0
SIDES: tuple[Literal["a", "b"], ...] = ("a", "b")


def add_tasks(store: FeedbackStore, config: CollectConfig, tasks: Sequence[Task]) -> int:
    """Tasks into the queue, personal data in them masked; how many were new."""
    scanner = scanner_of(config.people.privacy)
    masked = [masked_task(task, scanner) for task in tasks]
    return Assignments(store, config.people).add_tasks(masked)


def comparison_tasks(
    pairs: Sequence[Pair], config: CollectConfig, values: Sequence[float], round_number: int
) -> list[Task]:
    """Each pair as a task; ``values`` are their priorities."""
    return [
        task_of_pair(pair, overlap=config.people.overlap, priority=value, round_number=round_number)
        for pair, value in zip(pairs, values, strict=True)
    ]


def sample_tasks(
    trajectories: Sequence[Trajectory], config: CollectConfig, *, model: str, round_number: int
) -> list[Task]:
    """Ratings of single samples, or rankings of all samples of a prompt.

    Equal texts are ranked once; a prompt with fewer than three different ones is left out.
    """
    by_prompt: dict[str, list[Trajectory]] = {}
    for trajectory in sorted(trajectories, key=lambda t: t.sample_index):
        by_prompt.setdefault(trajectory.prompt.prompt_id, []).append(trajectory)
    tasks = []
    for prompt_id in sorted(by_prompt):
        samples = by_prompt[prompt_id]
        texts = list(dict.fromkeys(t.response_text for t in samples))
        kind = config.people.task
        if kind == "ranking" and len(texts) < 3:
            continue
        chosen = texts if kind == "ranking" else texts[:1]
        prompt = samples[0].prompt
        tasks.append(
            Task(
                task_id=f"{model}:{prompt_id}#{kind}",
                kind=kind,
                prompt_id=prompt_id,
                prompt=prompt.text,
                messages=prompt.messages,
                candidates=tuple(Candidate(text=text, model=model) for text in chosen),
                overlap=config.people.overlap,
                round=round_number,
            )
        )
    return tasks[: config.pairs]


def least_sure(
    pairs: Sequence[Pair], models: Sequence[str], count: int
) -> tuple[list[Pair], list[float]]:
    """The ``count`` pairs about which the reward models are least sure, with how unsure.

    Raises:
        RuntimeError: No pair can be scored.
    """
    from reward_service.model import RewardModel

    margins, usable = [], np.ones(len(pairs), bool)
    for path in models:
        model = RewardModel.load(Path(path))
        scores = [_scores(model, pairs, side) for side in SIDES]
        known = np.array([x is not None and y is not None for x, y in zip(*scores, strict=True)])
        usable &= known
        margins.append([(x or 0.0) - (y or 0.0) for x, y in zip(*scores, strict=True)])
    kept = [pair for pair, ok in zip(pairs, usable, strict=True) if ok]
    if not kept:
        raise RuntimeError(f"none of the {len(pairs)} pairs could be scored by {list(models)}")
    values = uncertainty(np.array(margins)[:, usable])
    order = {id(pair): float(value) for pair, value in zip(kept, values, strict=True)}
    chosen = most_uncertain(kept, values, count)
    return chosen, [order[id(pair)] for pair in chosen]


def _scores(
    model: RewardModel, pairs: Sequence[Pair], side: Literal["a", "b"]
) -> tuple[float | None, ...]:
    items = [
        ScoreItem(prompt=p.prompt, messages=p.messages, response=(p.a if side == "a" else p.b).text)
        for p in pairs
    ]
    return model.score(items, truncation="left").scores


def wait_for_people(
    work: Workplace, store: FeedbackStore, config: CollectConfig, round_number: int
) -> dict[str, Any]:
    """Until the tasks of the round have their answers; then the report on agreement.

    Raises:
        Stopped: Ctrl-C; --resume goes on waiting.
        TimeoutError: People were too few for too long.
    """
    people = config.people
    say = work.reporter.say
    say("people judge on a page that is started beside this, in another terminal:")
    say(f"  rlhf collect --serve --run {work.run_dir}")
    deadline = time.monotonic() + people.wait_hours * 3600
    with work.reporter.bar("judge") as bar:
        while True:
            given, wanted = store.database.read(lambda c: open_answers(c, round_number))
            bar.update(given, wanted, {})
            if given >= people.enough * wanted:
                break
            if work.stop():
                raise Stopped("waiting for people; their answers are safe, go on with --resume")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"after {people.wait_hours:g} h people have given {given} of {wanted} answers "
                    "(collect.people.wait_hours): invite more of them, close items on the "
                    "administrator's page, or lower collect.people.enough; then --resume"
                )
            time.sleep(POLL_S)
    return store_report(store, seed=work.config.seed)
