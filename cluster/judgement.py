"""The judgement stage: candidates from the policy, and what judges or data say of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer

from actors.config import SamplingConfig
from actors.datasets import RawPrompt
from actors.prompts import tokenize_prompts
from actors.trajectory import Demonstration, Message, SampleFailure, Trajectory
from cluster.data import judged_quality
from cluster.stages import Workplace
from cluster.stop import Stopped
from learner.config import RewardModelConfig
from reward_service.comparison import Annotator, Comparison
from reward_service.config import CollectConfig
from reward_service.feedback.agreement_report import agreement_report
from reward_service.feedback.collect import collect_judgements, given_preference, pairs_of_samples
from reward_service.feedback.store import FeedbackStore

STORE = "feedback.sqlite"

Item = TypeVar("Item")

# More candidates than pairs: two equal texts make no pair.
SPARE = 1.1


def open_store(run_dir: Path) -> FeedbackStore:
    """The judgements of a run."""
    return FeedbackStore(run_dir / STORE)


def judge(work: Workplace) -> dict[str, Any]:
    """Fill the store by the configured source; returns the report on agreement."""
    config = work.config.collect
    assert config is not None
    sources = {
        "simulated": from_judges,
        "demonstrations": from_demonstrations,
        "preferences": from_preferences,
    }
    return sources[config.source](work, config)


def reference_samples(
    comparisons: Sequence[Comparison], config: RewardModelConfig
) -> list[tuple[str, tuple[Message, ...], str]]:
    """Samples of the policy among the candidates; all candidates when none is known to be one."""
    candidates = {
        (c.pair.prompt, c.pair.messages, side.text): side.model
        for c in comparisons
        for side in (c.pair.a, c.pair.b)
    }
    sampled = [key for key, model in candidates.items() if model == "policy"]
    chosen = sampled or list(candidates)
    return random.Random(0).sample(chosen, min(len(chosen), config.normalize_samples))


def from_judges(work: Workplace, config: CollectConfig) -> dict[str, Any]:
    """Two samples a prompt, compared by simulated judges."""
    quality = judged_quality(work.data, config.quality)
    prompts = draw(work.data.prompts(), round(config.pairs * SPARE), work.config.seed)
    trajectories = sample(work, prompts, config, samples_per_prompt=2)
    pairs = pairs_of_samples(trajectories, model="policy", count=config.pairs)
    if not pairs:
        raise RuntimeError(
            "the policy wrote the same text twice for every prompt, so there is nothing to "
            "compare: raise collect.temperature"
        )
    by_id = {prompt.prompt_id: prompt for prompt in prompts}

    def perceived(prompt_id: str, response: str) -> float:
        return quality(by_id[prompt_id], response)

    with open_store(work.run_dir) as store, work.reporter.bar("judge") as bar:
        comparisons = collect_judgements(
            pairs,
            perceived,
            config.judge,
            store,
            seed=work.config.seed,
            on_progress=lambda done, total: bar.update(done, total, {}),
        )
    return agreement_report(comparisons, quality=perceived, seed=work.config.seed)


def from_demonstrations(work: Workplace, config: CollectConfig) -> dict[str, Any]:
    """The real response against a sample, and against the real response to another prompt."""
    demonstrations = draw(work.data.demonstrations(), config.pairs, work.config.seed)
    half = len(demonstrations) // 2
    if not half:
        raise ValueError("collect.source demonstrations needs at least two pairs in data.sft")
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
    others = demonstrations[half:]
    comparisons += [
        preferred(d, other.response, "shuffled")
        for d, other in zip(others, [*others[1:], others[0]], strict=True)
        if other.response != d.response
    ]
    with open_store(work.run_dir) as store:
        store.add_comparisons(comparisons)
    return agreement_report(comparisons, seed=work.config.seed)


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
    with open_store(work.run_dir) as store:
        store.add_comparisons(comparisons)
    return agreement_report(comparisons, seed=work.config.seed)


def sample(
    work: Workplace, raw: Sequence[RawPrompt], config: CollectConfig, *, samples_per_prompt: int
) -> list[Trajectory]:
    """Samples of the policy model for the given prompts; failures are warned of and left out."""
    model = work.config.policy_model
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
        for item in pool.generate(prompts, sampling, run_seed=work.config.seed, round_index=0):
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
