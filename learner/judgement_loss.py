"""The objective of the reward model: judged texts as ids, their rewards and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner import hf_directory
from learner.config import RewardModelConfig
from learner.judgements import FloatArray, JudgedPair, RatedResponse
from learner.supervised_losses import bradley_terry, rating_error
from learner.token_batches import Ids, IntArray, cut_by_budget, pad_right


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedItem:
    """A pair (two sequences) or a rated response (one), tokenised."""

    sequences: tuple[Ids, ...]
    prompt_id: str
    pair: JudgedPair | None = None
    rated: RatedResponse | None = None

    @property
    def votes(self) -> int:
        if self.pair is not None:
            return len(self.pair.judgements)
        assert self.rated is not None
        return self.rated.count


@dataclass(frozen=True, kw_only=True, slots=True)
class RatingScale:
    """Mean and deviation of the training ratings: rewards are fitted to standard scores."""

    mean: float = 0.0
    std: float = 1.0

    def standard(self, value: float) -> float:
        return (value - self.mean) / self.std


class JudgementLoss:
    """Bradley-Terry and rating loss of items, each forwarded once however many judged it."""

    def __init__(
        self, items: Sequence[JudgedItem], config: RewardModelConfig, scale: RatingScale
    ) -> None:
        self._items = items
        self._config = config
        self._scale = scale
        self.lengths: IntArray = np.array(
            [max(len(s) for s in item.sequences) for item in items], np.int64
        )
        self.rows: IntArray = np.array([len(item.sequences) for item in items], np.int64)
        self._votes: IntArray = np.array([item.votes for item in items], np.int64)

    def weight(self, items: IntArray) -> float:
        return float(self._votes[items].sum())

    def loss(self, model: Any, items: IntArray) -> tuple[Tensor, dict[str, float]]:
        chosen = [self._items[i] for i in items]
        rewards = scalar_rewards(model, [s for item in chosen for s in item.sequences])
        first = np.cumsum([0, *(len(item.sequences) for item in chosen)])
        device = rewards.device
        a, b, preference, margin, trust = [], [], [], [], []
        rated, target, weight = [], [], []
        for item, row in zip(chosen, first[:-1].tolist(), strict=True):
            if item.pair is not None:
                for judgement in item.pair.judgements:
                    a.append(row)
                    b.append(row + 1)
                    label = item.pair.label
                    preference.append(judgement.preference if label is None else label)
                    trust.append(judgement.weight)
                    # A margin belongs to what one judge said, not to a probability.
                    tie = judgement.preference == 0.5 or label is not None
                    step = 0 if tie else judgement.strength - 1
                    margin.append(self._config.strength_margin * step)
            elif item.rated is not None:
                rated.append(row)
                target.append(self._scale.standard(item.rated.mean))
                weight.append(float(item.rated.count))
        loss = rewards.sum() * 0.0
        sums: dict[str, float] = {}
        if a:
            loss = loss + bradley_terry(
                rewards[a],
                rewards[b],
                torch.tensor(preference, device=device),
                margin=torch.tensor(margin, device=device),
                weight=torch.tensor(trust, device=device),
            )
            right = (rewards[a] - rewards[b]).detach().cpu().numpy() * (np.array(preference) - 0.5)
            sums["agreement"] = float((right > 0).sum())
        if rated:
            error = rating_error(
                rewards[rated],
                torch.tensor(target, device=device),
                weight=torch.tensor(weight, device=device),
            )
            loss = loss + self._config.rating_weight * error
        return loss, sums


def scalar_rewards(model: Any, sequences: Sequence[Ids]) -> Tensor:
    """``[B]`` raw output of the head at the last token of each sequence, in float32."""
    device = next(model.parameters()).device
    states = hf_directory.backbone_states(model, pad_right(list(sequences), device))  # [B, T, H]
    last = torch.tensor([len(s) - 1 for s in sequences], device=device)
    chosen = states[torch.arange(len(sequences), device=device), last]  # [B, H]
    with torch.autocast(device.type, enabled=False):
        rewards: Tensor = model.score(chosen.float())[:, 0]
    return rewards


@torch.no_grad()
def score_sequences(model: Any, sequences: Sequence[Ids], token_budget: int) -> FloatArray:
    """``[n]`` raw scores, in order."""
    lengths: IntArray = np.array([len(s) for s in sequences], np.int64)
    scores = np.zeros(len(sequences))
    order = np.argsort(lengths, kind="stable")
    for batch in cut_by_budget(order, lengths, np.ones_like(lengths), token_budget):
        scores[batch] = scalar_rewards(model, [sequences[i] for i in batch]).cpu().numpy()
    return scores
