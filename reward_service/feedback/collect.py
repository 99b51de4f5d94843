"""From candidates to judgements: pairs of samples, judged or given, into the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from actors.trajectory import Message, Trajectory
from reward_service.comparison import Annotator, Candidate, Comparison, Pair
from reward_service.config import JudgeConfig
from reward_service.feedback.judges import Quality, assign, is_shared, make_judges
from reward_service.feedback.store import FeedbackStore

STORE_EVERY = 256
"""Judgements kept in memory before they are written."""


def pairs_of_samples(
    trajectories: Iterable[Trajectory], *, model: str, count: int | None = None
) -> list[Pair]:
    """Pair the samples of each prompt: first with second, third with fourth, and so on.

    Two equal texts make no pair. The result does not depend on the order in which samples
    finished. At most ``count`` pairs, spread over the prompts.
    """
    by_prompt: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_prompt.setdefault(trajectory.prompt.prompt_id, []).append(trajectory)
    rounds: list[tuple[int, Pair]] = []
    for prompt_id in sorted(by_prompt):
        samples = sorted(by_prompt[prompt_id], key=lambda t: t.sample_index)
        for number, (a, b) in enumerate(zip(samples[::2], samples[1::2], strict=False)):
            if a.response_text != b.response_text:
                rounds.append((number, _pair(a, b, model)))
    rounds.sort(key=lambda entry: entry[0])  # stable: prompts stay in order within a round
    return [pair for _, pair in rounds][:count]


def pairs_between(
    ours: Iterable[Trajectory], theirs: Iterable[Trajectory], *, models: tuple[str, str]
) -> list[Pair]:
    """One pair a prompt: a sample of each of two models. Which is a alternates.

    Prompts that one of the two has no sample of, and equal texts, make no pair.
    """
    first = {t.prompt.prompt_id: t for t in ours}
    second = {t.prompt.prompt_id: t for t in theirs}
    pairs = []
    for number, prompt_id in enumerate(sorted(first.keys() & second.keys())):
        a, b = first[prompt_id], second[prompt_id]
        if a.response_text == b.response_text:
            continue
        sides = [
            Candidate(text=t.response_text, model=m) for t, m in zip((a, b), models, strict=True)
        ]
        if number % 2:
            sides.reverse()
        pairs.append(
            Pair(
                item_id=f"{models[0]}:{models[1]}:{prompt_id}",
                prompt_id=prompt_id,
                prompt=a.prompt.text,
                a=sides[0],
                b=sides[1],
                messages=a.prompt.messages,
            )
        )
    return pairs


def _pair(a: Trajectory, b: Trajectory, model: str) -> Pair:
    return Pair(
        item_id=f"{model}:{a.prompt.prompt_id}#{a.sample_index}-{b.sample_index}",
        prompt_id=a.prompt.prompt_id,
        prompt=a.prompt.text,
        a=Candidate(text=a.response_text, model=model),
        b=Candidate(text=b.response_text, model=model),
        messages=a.prompt.messages,
    )


def given_preference(
    *,
    item_id: str,
    prompt: str,
    chosen: str,
    rejected: str,
    annotator: Annotator,
    messages: Sequence[Message] = (),
    prompt_id: str | None = None,
    chosen_model: str = "",
    rejected_model: str = "",
    seed: int = 0,
) -> Comparison:
    """A preference that exists already, as a judgement; a seeded coin decides which is a."""
    good = Candidate(text=chosen, model=chosen_model)
    bad = Candidate(text=rejected, model=rejected_model)
    chosen_is_a = bool(np.random.default_rng([seed, *item_id.encode()]).random() < 0.5)
    return Comparison(
        pair=Pair(
            item_id=item_id,
            prompt_id=prompt_id or item_id,
            prompt=prompt,
            a=good if chosen_is_a else bad,
            b=bad if chosen_is_a else good,
            messages=tuple(messages),
        ),
        annotator=annotator,
        choice="a" if chosen_is_a else "b",
    )


def collect_judgements(
    pairs: Sequence[Pair],
    quality: Quality,
    config: JudgeConfig,
    store: FeedbackStore,
    *,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Have simulated judges judge every pair, and store what they say.

    Safe to repeat after an interruption: the same judgements come out, and none is stored twice.
    ``on_progress(pairs done, pairs in all)`` is called after each write.
    """
    judges = make_judges(config, seed)
    collected: list[Comparison] = []
    unsaved: list[Comparison] = []
    for number, pair in enumerate(pairs, start=1):
        shared = is_shared(pair, config.shared, seed)
        panel = assign(pair, judges, config.judgements_per_pair if shared else 1, seed)
        unsaved += [judge.judge(pair, quality) for judge in panel]
        if len(unsaved) >= STORE_EVERY or number == len(pairs):
            store.add_comparisons(unsaved)
            collected += unsaved
            unsaved = []
            if on_progress is not None:
                on_progress(number, len(pairs))
    return collected
