"""The reward model: a scalar head on the fine-tuned model, trained on judgements.

Bradley-Terry on comparisons, squared error on ratings. Prompts, not pairs, are split three ways:
one part is trained on, a small one chooses the best evaluation, and the held-out part is touched
once, for the figures of the report. After training the output is scaled to mean 0 and standard
deviation 1 on reference samples; gain and bias are saved beside the weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.fingerprint import template_fingerprint
from actors.trajectory import Message
from learner import hf_directory
from learner.config import RewardModelConfig
from learner.judgement_loss import JudgedItem, JudgementLoss, RatingScale, score_sequences
from learner.judgements import (
    FloatArray,
    JudgedPair,
    Judgement,
    Teaching,
    accuracy_beside_judges,
    disagreements,
    judge_agreement,
    judged_pairs,
    judgement_accuracy,
    majority,
    majority_accuracy,
    rated_responses,
)
from learner.stage import finish, identity_of, split
from learner.supervised import OnStep, TrainingResult, train, use_threads
from learner.token_batches import Ids
from reward_service.comparison import Comparison, Rating, prompt_groups
from reward_service.encoding import RewardHead, encode
from reward_service.statistics import quantiles

logger = logging.getLogger(__name__)

DISAGREEMENTS = "disagreements.json"
"""Held-out pairs on which the model and most judges differ, for the administrator's page."""

ReferenceSample = tuple[str, Sequence[Message], str]
"""(prompt, messages, response) of a sample of the model that PPO will start from."""


@dataclass(frozen=True, kw_only=True)
class RewardModelReport:
    """What the reward model is worth; saved as ``training_report.json``.

    Shares are ``None`` where the data has no case of them. All figures but ``training`` are of
    held-out prompts, on which nothing was trained or chosen.
    """

    held_out_accuracy: float | None
    """How often it prefers the response that most judges of the pair prefer."""
    ci_low: float | None
    """95 % Wilson interval."""
    ci_high: float | None
    n: int
    """Pairs with a majority."""
    judgement_accuracy: float | None
    """How often it agrees with a single judgement; ties are left out."""
    judgement_ci_low: float | None
    """95 % bootstrap interval over prompts."""
    judgement_ci_high: float | None
    judgements: int
    judge_agreement: float | None
    """How often one judge agrees with the majority of the others."""
    judge_agreement_ci_low: float | None
    judge_agreement_ci_high: float | None
    judge_agreement_n: int
    accuracy_beside_judges: float | None
    """The reward model in the left-out judge's place, on the same cases as judge_agreement."""
    length_baseline: float | None
    """Accuracy of always preferring the longer (or the shorter) response."""
    length_prefers: str
    """'longer' or 'shorter', whichever was right more often on the pairs trained on."""
    rating_correlation: float | None
    """Pearson's, between reward and mean rating."""
    train_pairs: int
    train_judgements: int
    held_out_pairs: int
    train_ratings: int
    held_out_ratings: int
    ties: int
    """Judgements that prefer neither, in all."""
    skipped: int
    """Pairs and ratings longer than the context."""
    gain: float
    bias: float
    reference_samples: int
    training: TrainingResult


def train_reward_model(
    config: RewardModelConfig,
    comparisons: Sequence[Comparison],
    ratings: Sequence[Rating],
    model_dir: Path | str,
    output_dir: Path,
    *,
    reference_samples: Sequence[ReferenceSample],
    seed: int,
    teaching: Teaching | None = None,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume: bool = False,
) -> RewardModelReport:
    """Train a reward model and write it as a Hugging Face directory with ``reward_head.json``.

    Args:
        config: Batch shape, epochs, optimizer, shares held out, margin, weight of ratings.
        comparisons: Judgements of pairs, several judges a pair or one.
        ratings: Ratings of single responses, or none.
        model_dir: The fine-tuned causal language model that training starts from.
        output_dir: Becomes the checkpoint.
        reference_samples: Samples of that model, for the normalisation. Without any, the
            responses that were judged are used.
        seed: Of the split, the order and the bootstrap.
        teaching: Weights of judges, or labels in the place of votes; default: votes as they are.
        on_step: Told (step, total, metrics) after every step.
        should_stop: Asked after every step; ``Interrupted`` is raised when it says so.
        resume: Go on from the state that an interrupted call left in ``output_dir``.

    Raises:
        ValueError: No judgements, too few prompts to hold some out, or a wrong model.
        FileNotFoundError: ``model_dir`` is no model directory.
        RuntimeError: Training diverged.
    """
    if not comparisons and not ratings:
        raise ValueError(
            "there are no judgements: collect comparisons or ratings before training a reward model"
        )
    tokenizer = hf_directory.load_tokenizer(model_dir)
    model = hf_directory.load_scalar_model(model_dir, tokenizer)
    hf_directory.check_vocabulary(model, tokenizer, str(model_dir))
    encoder = _Encoder(tokenizer, hf_directory.context_length(model, tokenizer))
    items, skipped = _items(config, judged_pairs(comparisons, teaching), ratings, encoder)
    trained, choosing, held_out = _split(items, config, seed)
    scale = _rating_scale(trained)
    result = train(
        model,
        JudgementLoss(trained, config, scale),
        config,
        output_dir=output_dir,
        seed=seed,
        identity=_identity(config, seed, items),
        held_out=JudgementLoss(choosing, config, scale) if choosing else None,
        keep_best=True,
        resume=resume,
        on_step=on_step,
        should_stop=should_stop,
    )
    with use_threads(config.threads):
        samples = _reference_ids(config, reference_samples, items, encoder, seed)
        raw = score_sequences(model, samples, config.tokens_per_micro_batch)
        gain, bias = normalisation(raw)
        figures, wrong = _held_out_figures(model, config, trained, held_out, seed)
    (output_dir / DISAGREEMENTS).write_text(
        json.dumps(wrong, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    report = RewardModelReport(
        **figures,
        train_pairs=sum(item.pair is not None for item in trained),
        train_judgements=sum(item.votes for item in trained if item.pair),
        held_out_pairs=sum(item.pair is not None for item in held_out),
        train_ratings=sum(item.votes for item in trained if item.rated),
        held_out_ratings=sum(item.votes for item in held_out if item.rated),
        ties=sum(j.preference == 0.5 for i in items if i.pair for j in i.pair.judgements),
        skipped=skipped,
        gain=gain,
        bias=bias,
        reference_samples=len(samples),
        training=result,
    )
    hf_directory.save(model, tokenizer, output_dir)
    RewardHead(
        gain=gain,
        bias=bias,
        fingerprint=template_fingerprint(tokenizer),
        base=str(model_dir),
        info={k: v for k, v in asdict(report).items() if k != "training"}
        | {"reference_quantiles": quantiles(gain * raw + bias)},
    ).save(output_dir)
    finish(output_dir, report)
    return report


def normalisation(raw: FloatArray) -> tuple[float, float]:
    """(gain, bias) with which ``gain * raw + bias`` has mean 0 and standard deviation 1.

    (1, 0) without samples.
    """
    if len(raw) == 0:
        return 1.0, 0.0
    std = float(raw.std())
    if std < 1e-6 * max(1.0, float(np.abs(raw).max())):
        logger.warning("the reward model gives all reference samples the same score: gain stays 1")
        std = 1.0
    return 1.0 / std, -float(raw.mean()) / std


class _Encoder:
    """Texts to ids, by the function that the reward service uses."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self._tokenizer = tokenizer
        self.context = context

    def ids(self, prompt: str, messages: Sequence[Message], response: str) -> Ids:
        return np.array(encode(self._tokenizer, prompt, messages, response), np.int32)

    def fits(self, *sequences: Ids) -> bool:
        return max(len(s) for s in sequences) <= self.context


def _items(
    config: RewardModelConfig,
    judged: Sequence[JudgedPair],
    ratings: Sequence[Rating],
    encoder: _Encoder,
) -> tuple[list[JudgedItem], int]:
    """Tokenised pairs and rated responses, and how many were longer than the context."""
    rated_alone = rated_responses(ratings)
    prompts = iter(
        prompt_groups(
            [(pair.prompt_id, pair.prompt, pair.messages) for pair in judged]
            + [(rated.prompt_id, rated.prompt, ()) for rated in rated_alone]
        )
    )
    items = [
        JudgedItem(
            sequences=(
                encoder.ids(pair.prompt, pair.messages, pair.a),
                encoder.ids(pair.prompt, pair.messages, pair.b),
            ),
            prompt_id=next(prompts),
            pair=pair,
        )
        for pair in judged
    ]
    items += [
        JudgedItem(
            sequences=(encoder.ids(rated.prompt, (), rated.response),),
            prompt_id=next(prompts),
            rated=rated,
        )
        for rated in rated_alone
    ]
    fitting = [item for item in items if encoder.fits(*item.sequences)]
    skipped = len(items) - len(fitting)
    if skipped:
        message = (
            f"{skipped} of {len(items)} judged items are longer than the context of "
            f"{encoder.context} tokens"
        )
        if config.overlong == "error" or not fitting:
            raise ValueError(
                f"{message}: set reward_model.overlong to 'skip', or use a model with a longer "
                "context"
            )
        logger.warning("%s and are skipped", message)
    return fitting, skipped


def _split(
    items: Sequence[JudgedItem], config: RewardModelConfig, seed: int
) -> tuple[list[JudgedItem], list[JudgedItem], list[JudgedItem]]:
    """(trained, choosing, held out), by prompt."""
    prompts = list(dict.fromkeys(item.prompt_id for item in items))
    if len(prompts) < 3:
        raise ValueError(
            f"the judgements are on {len(prompts)} prompts: at least 3 are needed, to train on, "
            "to choose the best weights and to measure the accuracy"
        )
    held, rest = split(len(prompts), config.held_out_share, seed)
    if len(rest) < 2:
        held, rest = held[:-1], np.append(rest, held[-1])
    choosing_prompts: set[str] = set()
    if config.choosing_share > 0:
        chosen, _ = split(len(rest), config.choosing_share, seed + 1)
        choosing_prompts = {prompts[i] for i in rest[chosen]}
    held_prompts = {prompts[i] for i in held}
    apart = held_prompts | choosing_prompts
    return (
        [item for item in items if item.prompt_id not in apart],
        [item for item in items if item.prompt_id in choosing_prompts],
        [item for item in items if item.prompt_id in held_prompts],
    )


def _rating_scale(trained: Sequence[JudgedItem]) -> RatingScale:
    means = [item.rated.mean for item in trained if item.rated]
    if not means:
        return RatingScale()
    return RatingScale(mean=float(np.mean(means)), std=max(float(np.std(means)), 0.1))


def _identity(config: RewardModelConfig, seed: int, items: Sequence[JudgedItem]) -> str:
    votes = "".join(
        "".join(_vote(item.pair, j) for j in item.pair.judgements)
        if item.pair
        else f"{item.rated} "
        for item in items
    )
    rows = [sequence for item in items for sequence in item.sequences]
    return identity_of(config, seed, [*rows, np.frombuffer(votes.encode(), np.uint8)])


def _vote(pair: JudgedPair, judgement: Judgement) -> str:
    plain = f"{judgement.preference}/{judgement.strength} "
    taught = (
        ""
        if judgement.weight == 1.0 and pair.label is None
        else (f"{judgement.weight}/{pair.label} ")
    )
    return plain + taught


def _reference_ids(
    config: RewardModelConfig,
    reference_samples: Sequence[ReferenceSample],
    items: Sequence[JudgedItem],
    encoder: _Encoder,
    seed: int,
) -> list[Ids]:
    """At most ``normalize_samples`` reference samples as ids."""
    sequences = [encoder.ids(*sample) for sample in reference_samples]
    sequences = [s for s in sequences if encoder.fits(s)]
    if not sequences:
        sequences = [s for item in items for s in item.sequences]
    keep = np.random.default_rng([seed, 2]).permutation(len(sequences))
    return [sequences[i] for i in np.sort(keep[: config.normalize_samples])]


def _held_out_figures(
    model: Any,
    config: RewardModelConfig,
    trained: Sequence[JudgedItem],
    held_out: Sequence[JudgedItem],
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of the report, and the held-out pairs that the model is most wrong about."""
    rewards = score_sequences(
        model, [s for item in held_out for s in item.sequences], config.tokens_per_micro_batch
    )
    first = np.cumsum([0, *(len(item.sequences) for item in held_out)])[:-1]
    pairs, differences, lengths = [], [], []
    rated, rated_rewards = [], []
    for item, row in zip(held_out, first.tolist(), strict=True):
        if item.pair is not None:
            pairs.append(item.pair)
            differences.append(rewards[row] - rewards[row + 1])
            lengths.append(_length_lead(item))
        elif item.rated is not None:
            rated.append(item.rated.mean)
            rated_rewards.append(float(rewards[row]))
    lead = np.array(differences)
    accuracy = majority_accuracy(pairs, lead)
    single = judgement_accuracy(pairs, lead, seed=seed)
    judges = judge_agreement(pairs, seed=seed)
    sign = _length_sign(trained)
    figures = {
        "held_out_accuracy": accuracy.value,
        "ci_low": accuracy.low,
        "ci_high": accuracy.high,
        "n": accuracy.n,
        "judgement_accuracy": single.value,
        "judgement_ci_low": single.low,
        "judgement_ci_high": single.high,
        "judgements": single.n,
        "judge_agreement": judges.value,
        "judge_agreement_ci_low": judges.low,
        "judge_agreement_ci_high": judges.high,
        "judge_agreement_n": judges.n,
        "accuracy_beside_judges": accuracy_beside_judges(pairs, lead, seed=seed).value,
        "length_baseline": majority_accuracy(pairs, sign * np.array(lengths)).value,
        "length_prefers": "longer" if sign > 0 else "shorter",
        "rating_correlation": _correlation(rated, rated_rewards),
    }
    return figures, disagreements(pairs, lead, most=50)


def _length_lead(item: JudgedItem) -> float:
    return float(len(item.sequences[0]) - len(item.sequences[1]))


def _length_sign(trained: Sequence[JudgedItem]) -> float:
    """+1 when the longer response was preferred more often in training, else -1."""
    lead = 0.0
    for item in trained:
        choice = majority(item.pair.judgements) if item.pair else None
        if choice is not None:
            lead += float(np.sign(_length_lead(item))) * (choice - 0.5)
    return 1.0 if lead >= 0 else -1.0


def _correlation(ratings: Sequence[float], rewards: Sequence[float]) -> float | None:
    if len(ratings) < 3 or np.std(ratings) == 0 or np.std(rewards) == 0:
        return None
    return float(np.corrcoef(ratings, rewards)[0, 1])
