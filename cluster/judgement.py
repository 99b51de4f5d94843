"""The judgement stage: candidates from the policy, and what judges or data say of them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer

from actors.config import SamplingConfig
from actors.datasets import RawPrompt
from actors.prompts import tokenize_prompts
from actors.trajectory import Demonstration, Message, SampleFailure, Trajectory
from cluster.config import RunConfig
from cluster.data import judged_quality
from cluster.feedback import STORE
from cluster.people import (
    add_tasks,
    comparison_tasks,
    least_sure,
    sample_tasks,
    wait_for_people,
)
from cluster.stages import Workplace
from cluster.stop import Stopped
from learner.config import RewardModelConfig
from learner.judgements import Teaching
from reward_service.comparison import Annotator, Comparison, Pair
from reward_service.config import CollectConfig
from reward_service.feedback.aggregate import consensus
from reward_service.feedback.agreement_report import agreement_report
from reward_service.feedback.assignment import open_answers
from reward_service.feedback.collect import (
    collect_judgements,
    given_preference,
    pairs_between,
    pairs_of_samples,
)
from reward_service.feedback.presidio import scanner_of
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.tasks import Task

Item = TypeVar("Item")

# More candidates than pairs: two equal texts make no pair.
SPARE = 1.1


def open_store(config: RunConfig) -> FeedbackStore:
    """The judgements of a run."""
    given = config.collect.store if config.collect is not None else None
    return FeedbackStore(given or config.run_dir / STORE)


def judge(work: Workplace) -> dict[str, Any]:
    """Fill the store by the configured source; returns the report on agreement."""
    config = work.config.collect
    assert config is not None
    sources = {
        "simulated": from_judges,
        "people": from_people,
        "demonstrations": from_demonstrations,
        "preferences": from_preferences,
    }
    return sources[config.source](work, config)


def reference_samples(
    comparisons: Sequence[Comparison], config: RewardModelConfig
) -> list[tuple[str, tuple[Message, ...], str]]:
    """Samples of the policy among the candidates; all candidates when none is known to be one."""
    by_text = {
        # Turns are dictionaries, which cannot be part of a key.
        (c.pair.prompt, repr(c.pair.messages), side.text): (c.pair.messages, side.model)
        for c in comparisons
        for side in (c.pair.a, c.pair.b)
    }
    candidates = [
        ((prompt, messages, text), model)
        for (prompt, _, text), (messages, model) in by_text.items()
    ]
    # The newest policy is what PPO starts from: policy, policy-1, policy-2, ...
    policies = {
        model: int(found[1] or 0)
        for _, model in candidates
        if (found := re.fullmatch(r"policy(?:-(\d+))?", model))
    }
    newest = max(policies, key=policies.__getitem__, default=None)
    sampled = [sample for sample, model in candidates if model == newest]
    chosen = sampled or [sample for sample, _ in candidates]
    return random.Random(0).sample(chosen, min(len(chosen), config.normalize_samples))


def teaching_of(comparisons: Sequence[Comparison], config: RewardModelConfig) -> Teaching:
    """How votes become labels: as they are, weighted by the judge, or by what they say together."""
    if config.labels == "votes" or not comparisons:
        return Teaching()
    found = consensus(comparisons)
    if config.labels == "weighted":
        return Teaching(weights=found.reliability)
    return Teaching(labels=found.preference)


def from_judges(work: Workplace, config: CollectConfig) -> dict[str, Any]:
    """Two samples a prompt, compared by simulated judges."""
    quality = judged_quality(work.data, config.quality)
    pairs, _ = candidate_pairs(work, config)
    by_id = {prompt.prompt_id: prompt for prompt in work.data.prompts()}

    def perceived(prompt_id: str, response: str) -> float:
        return quality(by_id[prompt_id], response)

    with open_store(work.config) as store, work.reporter.bar("judge") as bar:
        comparisons = collect_judgements(
            as_stored(store, pairs),
            perceived,
            config.judge,
            store,
            seed=work.config.seed,
            on_progress=lambda done, total: bar.update(done, total, {}),
        )
    return agreement_report(comparisons, quality=perceived, seed=work.config.seed)


def as_stored(store: FeedbackStore, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs that an interrupted collection has stored already, as they are there.

    What was judged stays, and a sample need not come out the same twice (in other batches).
    """
    known = {pair.item_id: pair for pair in store.pairs()}
    return [known.get(pair.item_id, pair) for pair in pairs]


def from_people(work: Workplace, config: CollectConfig) -> dict[str, Any]:
    """Samples judged by people in a browser; waits until they have."""
    scanner_of(config.people.privacy)  # what is missing for it is told before anything is written
    with open_store(work.config) as store:
        if store.database.read(lambda c: open_answers(c, config.round))[1] == 0:
            add_tasks(store, config, people_tasks(work, config))
        work.session.end()  # people take hours: nothing waits with them
        return wait_for_people(work, store, config, config.round)


def people_tasks(work: Workplace, config: CollectConfig) -> list[Task]:
    """What people are asked, of the configured kind."""
    if config.people.task == "comparison":
        pairs, values = candidate_pairs(work, config)
        return comparison_tasks(pairs, config, values, config.round)
    count = config.people.candidates if config.people.task == "ranking" else 1
    prompts = draw(work.data.prompts(), round(config.pairs * SPARE), _seed(work, config))
    trajectories = sample(work, prompts, config, samples_per_prompt=count)
    tasks = sample_tasks(
        trajectories, config, model=_policy_name(config), round_number=config.round
    )
    if not tasks:
        raise RuntimeError(
            "the policy wrote too few different texts to judge: raise collect.temperature"
        )
    return tasks


def candidate_pairs(work: Workplace, config: CollectConfig) -> tuple[list[Pair], list[float]]:
    """Pairs to judge and their priorities.

    Two samples of the policy, or one of it and one of an earlier policy. With ``least_sure_of``
    several times as many are written, and the reward models choose among them.
    """
    factor = config.candidate_factor if config.least_sure_of else 1.0
    wanted = round(config.pairs * factor)
    prompts = draw(work.data.prompts(), round(wanted * SPARE), _seed(work, config))
    name = _policy_name(config)
    among = prompts[::2] if config.opponents else prompts
    pairs = pairs_of_samples(
        sample(work, among, config, samples_per_prompt=2), model=name, count=wanted
    )
    if config.opponents:
        against = prompts[1::2]
        own = sample(work, against, config, samples_per_prompt=1)
        for number, (opponent, path) in enumerate(config.opponents.items()):
            share = against[number :: len(config.opponents)]
            ids = {prompt.prompt_id for prompt in share}
            theirs = sample(work, share, config, samples_per_prompt=1, model=Path(path))
            mine = [t for t in own if t.prompt.prompt_id in ids]
            pairs += pairs_between(mine, theirs, models=(name, opponent))
    if not pairs:
        raise RuntimeError(
            "the policy wrote the same text twice for every prompt, so there is nothing to "
            "compare: raise collect.temperature"
        )
    if config.least_sure_of:
        return least_sure(pairs, config.least_sure_of, config.pairs)
    chosen = draw(pairs, config.pairs, _seed(work, config)) if config.opponents else pairs
    return chosen[: config.pairs], [0.0] * min(len(chosen), config.pairs)


def _policy_name(config: CollectConfig) -> str:
    return f"policy-{config.round}" if config.round else "policy"


def _seed(work: Workplace, config: CollectConfig) -> int:
    """Each round draws other prompts and samples."""
    return work.config.seed + 1000 * config.round


def from_demonstrations(work: Workplace, config: CollectConfig) -> dict[str, Any]:
    """The real response against a sample, and against the real response to another prompt.

    Both halves are made such that length says little: only responses that the policy has room to
    write, and another prompt's response that is about as long.
    """
    writable = responses_within(work, work.data.demonstrations())
    demonstrations = draw(writable, config.pairs, work.config.seed)
    half = len(demonstrations) // 2
    if not half:
        raise ValueError(
            "collect.source demonstrations needs at least two pairs in data.sft whose response has"
            f" fewer than sampling.max_new_tokens ({work.config.sampling.max_new_tokens}) tokens"
        )
    prompts = [
        RawPrompt(prompt_id=d.example_id, text=d.prompt, messages=d.messages)
        for d in demonstrations[:half]
    ]
    real = {d.example_id: d for d in demonstrations}
    annotator = Annotator(annotator_id="demonstrations", kind="simulated")

    def preferred(d: Demonstration, rejected: str, model: str) -> Comparison:
        return given_preference(
            item_id=f"{model}:{d.example_id}",
            prompt_id=d.example_id,
            prompt=d.prompt,
            messages=d.messages,
            chosen=d.response,
            rejected=rejected,
            chosen_model="demonstration",
            rejected_model=model,
            annotator=annotator,
            seed=work.config.seed,
        )

    comparisons = [
        preferred(real[t.prompt.prompt_id], t.response_text, "policy")
        for t in sample(work, prompts, config, samples_per_prompt=1)
        if t.response_text != real[t.prompt.prompt_id].response
    ]
    comparisons += [
        preferred(d, other, "shuffled") for d, other in swapped_responses(demonstrations[half:])
    ]
    with open_store(work.config) as store:
        stored = as_stored(store, [c.pair for c in comparisons])
        comparisons = [replace(c, pair=p) for c, p in zip(comparisons, stored, strict=True)]
        store.add_comparisons(comparisons)
    return agreement_report(comparisons, seed=work.config.seed)


def responses_within(
    work: Workplace, demonstrations: Sequence[Demonstration]
) -> list[Demonstration]:
    """Those that the policy can write, end included, within ``sampling.max_new_tokens``."""
    tokenizer = AutoTokenizer.from_pretrained(work.config.policy_model)
    texts = [d.response for d in demonstrations]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    limit = work.config.sampling.max_new_tokens
    return [d for d, found in zip(demonstrations, ids, strict=True) if len(found) < limit]


def swapped_responses(
    demonstrations: Sequence[Demonstration],
) -> Iterator[tuple[Demonstration, str]]:
    """Each with the response to another prompt: neighbours in length (in characters) swap."""
    by_length = sorted(demonstrations, key=lambda d: (len(d.response), d.example_id))
    for first, second in zip(by_length[::2], by_length[1::2], strict=False):
        if first.response != second.response:
            yield first, second.response
            yield second, first.response


def from_preferences(work: Workplace, config: CollectConfig) -> dict[str, Any]:
    """The preferences that the data has, as they are."""
    annotator = Annotator(annotator_id="preferences", kind="human")
    chosen = draw(work.data.preferences(), config.pairs, work.config.seed)
    comparisons = [
        given_preference(
            item_id=p.example_id,
            prompt=p.prompt,
            messages=p.messages,
            chosen=p.chosen,
            rejected=p.rejected,
            annotator=annotator,
            seed=work.config.seed,
        )
        for p in chosen
        if p.chosen != p.rejected
    ]
    with open_store(work.config) as store:
        store.add_comparisons(comparisons)
    return agreement_report(comparisons, seed=work.config.seed)


def sample(
    work: Workplace,
    raw: Sequence[RawPrompt],
    config: CollectConfig,
    *,
    samples_per_prompt: int,
    model: Path | None = None,
) -> list[Trajectory]:
    """Samples of a model (the policy) for the given prompts; failures are warned of and left out.

    A second model gets other seeds than the first, or the two would write much the same.
    """
    stream = 0 if model is None else 1
    model = model or work.config.policy_model
    prompts = tokenize_prompts(raw, AutoTokenizer.from_pretrained(model), work.config.data)
    sampling = SamplingConfig(
        max_new_tokens=work.config.sampling.max_new_tokens,
        temperature=config.temperature,
        samples_per_prompt=samples_per_prompt,
    )
    work.reporter.say("starting vLLM")
    pool = work.session.rollouts(model)
    found: list[Trajectory] = []
    failed = 0
    with work.reporter.bar("generate") as bar:
        for item in pool.generate(
            prompts, sampling, run_seed=_seed(work, config), round_index=stream
        ):
            if isinstance(item, SampleFailure):
                failed += 1
                work.reporter.warn(f"{item.sample_id}: {item.reason}")
            else:
                found.append(item)
            bar.update(len(found) + failed, len(prompts) * samples_per_prompt, {})
            if work.stop():
                raise Stopped("generation of candidates; run again with --resume")
    return found


def draw(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """``count`` of the items (all, if there are fewer), in a seeded order."""
    return random.Random(f"judgement/{seed}").sample(items, min(count, len(items)))
