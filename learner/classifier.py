"""Content moderation as a reward: a scalar head trained on labelled texts.

The head gives the log-odds that a text is flagged; the checkpoint is a reward model like any
other, whose score is the probability. As a reward term with a negative weight it is a penalty.

Texts are split three ways: one part is trained on, one chooses the weights and the threshold, and
the held-out part is touched once, for precision and recall at that threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from actors.fingerprint import template_fingerprint
from learner import hf_directory
from learner.config import RewardModelConfig
from learner.judgement_loss import scalar_rewards, score_sequences
from learner.judgements import FloatArray, share_of
from learner.stage import finish, identity_of, split
from learner.supervised import OnStep, TrainingResult, train, use_threads
from learner.token_batches import Ids, IntArray
from reward_service.comparison import LabelledText
from reward_service.encoding import RewardHead, encode


@dataclass(frozen=True, kw_only=True)
class ClassifierReport:
    """What the classifier is worth; saved as ``training_report.json``.

    All figures but ``training`` and ``validation_f1`` are of held-out texts, on which nothing was
    trained or chosen.
    """

    threshold: float
    """Probability from which a text is flagged: the one with the best F1 on the validation part."""
    validation_f1: float
    precision: float | None
    """Of the texts that it flags, how many are labelled so; ``None`` when it flags none."""
    precision_low: float | None
    """95 % Wilson interval."""
    precision_high: float | None
    recall: float | None
    recall_low: float | None
    recall_high: float | None
    f1: float
    accuracy: float
    roc_auc: float | None
    """Probability that a flagged text scores above another one; 0.5 is chance."""
    flagged_share: float
    """Of the held-out texts: the precision of flagging everything."""
    train_texts: int
    validation_texts: int
    held_out_texts: int
    skipped: int
    """Texts longer than the context."""
    training: TrainingResult


class LabelLoss:
    """Binary cross-entropy of labelled texts, in nats, summed."""

    def __init__(self, sequences: Sequence[Ids], flagged: Sequence[bool]) -> None:
        self._sequences = sequences
        self._flagged = torch.tensor(np.array(flagged, np.float32))
        self.lengths: IntArray = np.array([len(s) for s in sequences], np.int64)
        self.rows: IntArray = np.ones(len(sequences), np.int64)

    def weight(self, items: IntArray) -> float:
        return float(len(items))

    def loss(self, model: Any, items: IntArray) -> tuple[Tensor, dict[str, float]]:
        logits = scalar_rewards(model, [self._sequences[i] for i in items])  # [B]
        labels = self._flagged[items].to(logits.device)
        loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        right = (logits.detach() > 0) == (labels > 0.5)
        return loss, {"accuracy": float(right.sum())}


def train_classifier(
    config: RewardModelConfig,
    texts: Sequence[LabelledText],
    model_dir: Path | str,
    output_dir: Path,
    *,
    seed: int,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume: bool = False,
) -> ClassifierReport:
    """Train a classifier and write it as a reward model whose score is a probability.

    Args:
        config: As for a reward model; ``choosing_share`` is the validation part.
        texts: Labelled; those of one ``text_id`` stay on one side of the split.
        model_dir: The causal language model that training starts from.
        output_dir: Becomes the checkpoint.
        seed: Of the split and the order.
        on_step: Told (step, total, metrics) after every step.
        should_stop: Asked after every step; ``Interrupted`` is raised when it says so.
        resume: Go on from the state that an interrupted call left in ``output_dir``.

    Raises:
        ValueError: Too few texts, one label only, no validation part, or a wrong model.
        FileNotFoundError: ``model_dir`` is no model directory.
        RuntimeError: Training diverged.
    """
    tokenizer = hf_directory.load_tokenizer(model_dir)
    model = hf_directory.load_scalar_model(model_dir, tokenizer)
    hf_directory.check_vocabulary(model, tokenizer, str(model_dir))
    context = hf_directory.context_length(model, tokenizer)
    encoded = [np.array(encode(tokenizer, t.prompt, (), t.text), np.int32) for t in texts]
    fitting = [i for i, ids in enumerate(encoded) if len(ids) <= context]
    if len(fitting) < len(texts) and config.overlong == "error":
        raise ValueError(
            f"{len(texts) - len(fitting)} of {len(texts)} texts are longer than the context of "
            f"{context} tokens: set reward_model.overlong to 'skip'"
        )
    sequences = [encoded[i] for i in fitting]
    flagged = np.array([texts[i].flagged for i in fitting], bool)
    parts = _split([texts[i].text_id for i in fitting], flagged, config, seed)
    trained, validation, held_out = parts

    def objective(part: IntArray) -> LabelLoss:
        return LabelLoss([sequences[i] for i in part], flagged[part].tolist())

    result = train(
        model,
        objective(trained),
        config,
        output_dir=output_dir,
        seed=seed,
        identity=identity_of(config, seed, [*sequences, flagged]),
        held_out=objective(validation),
        keep_best=True,
        resume=resume,
        on_step=on_step,
        should_stop=should_stop,
    )

    def probabilities(part: IntArray) -> FloatArray:
        budget = config.tokens_per_micro_batch
        logits = score_sequences(model, [sequences[i] for i in part], budget)
        return 1.0 / (1.0 + np.exp(-logits))

    with use_threads(config.threads):
        threshold, best = choose_threshold(probabilities(validation), flagged[validation])
        figures = held_out_figures(probabilities(held_out), flagged[held_out], threshold)
    report = ClassifierReport(
        threshold=threshold,
        validation_f1=best,
        **figures,
        train_texts=len(trained),
        validation_texts=len(validation),
        held_out_texts=len(held_out),
        skipped=len(texts) - len(fitting),
        training=result,
    )
    hf_directory.save(model, tokenizer, output_dir)
    RewardHead(
        gain=1.0,
        bias=0.0,
        activation="sigmoid",
        fingerprint=template_fingerprint(tokenizer),
        base=str(model_dir),
        info={k: v for k, v in asdict(report).items() if k != "training"},
    ).save(output_dir)
    finish(output_dir, report)
    return report


def choose_threshold(
    probabilities: FloatArray, flagged: np.ndarray[Any, np.dtype[np.bool_]]
) -> tuple[float, float]:
    """(threshold, F1) with the best F1; halfway between two texts' probabilities.

    Of equal ones the highest is taken: it flags the fewest texts.
    """
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    hits = np.cumsum(flagged[order])  # [n] flagged texts among the first 1 .. n
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + flagged.sum())
    # Only between different probabilities can a line be drawn.
    possible = np.append(ranked[:-1] > ranked[1:], True)
    last = int(np.argmax(np.where(possible, f1, -1.0)))
    below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
    return float((ranked[last] + below) / 2), float(f1[last])


def held_out_figures(
    probabilities: FloatArray, flagged: np.ndarray[Any, np.dtype[np.bool_]], threshold: float
) -> dict[str, Any]:
    """The figures of :class:`ClassifierReport` that the held-out texts give."""
    guessed = probabilities >= threshold
    hits = int((guessed & flagged).sum())
    precision = share_of(hits, int(guessed.sum()))
    recall = share_of(hits, int(flagged.sum()))
    return {
        "precision": precision.value,
        "precision_low": precision.low,
        "precision_high": precision.high,
        "recall": recall.value,
        "recall_low": recall.low,
        "recall_high": recall.high,
        "f1": 2 * hits / max(1, int(guessed.sum() + flagged.sum())),
        "accuracy": float((guessed == flagged).mean()),
        "roc_auc": roc_auc(probabilities, flagged),
        "flagged_share": float(flagged.mean()),
    }


def roc_auc(scores: FloatArray, flagged: np.ndarray[Any, np.dtype[np.bool_]]) -> float | None:
    """Share of (flagged, other) pairs in the right order, ties half (Mann and Whitney 1947)."""
    above, below = np.sort(scores[flagged]), np.sort(scores[~flagged])
    if not len(above) or not len(below):
        return None
    less = np.searchsorted(below, above, "left").sum()
    equal = np.searchsorted(below, above, "right").sum() - less
    return float((less + 0.5 * equal) / (len(above) * len(below)))


def _split(
    ids: Sequence[str],
    flagged: np.ndarray[Any, np.dtype[np.bool_]],
    config: RewardModelConfig,
    seed: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """(trained, validation, held out) as indices, by text id, with both labels in each."""
    if config.choosing_share == 0:
        raise ValueError(
            "the threshold is chosen on a validation part: set reward_model.choosing_share above 0"
        )
    names = list(dict.fromkeys(ids))
    parts: list[IntArray] = []
    if len(names) >= 10:
        held, rest = split(len(names), config.held_out_share, seed)
        chosen, trained = split(len(rest), config.choosing_share, seed + 1)
        place = {names[i]: 2 for i in held}
        place |= {names[rest[i]]: 1 for i in chosen} | {names[rest[i]]: 0 for i in trained}
        where = np.array([place[name] for name in ids])
        parts = [np.flatnonzero(where == part) for part in range(3)]
    if not parts or any(len(set(flagged[part].tolist())) < 2 for part in parts):
        raise ValueError(
            f"{len(names)} labelled texts, {int(flagged.sum())} of them flagged, are too few: "
            "training, validation and held-out part each need both labels"
        )
    return parts[0], parts[1], parts[2]
