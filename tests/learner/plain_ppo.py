"""A PPO iteration written down from the formulas, to hold the learner against.

Everything is the opposite of the learner's way: float64, whole padded batches with an explicit
attention mask, logits of every position, loops over samples and tokens, no micro-batches.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from learner.batch import PPOBatch, minibatch_rows
from learner.config import OptimizerConfig, PPOConfig


class PlainModels:
    """Policy, reference and critic in float64."""

    def __init__(self, policy_dir: Path, reference_dir: Path, shared_trunk: bool) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self.policy = load(policy_dir, dtype=torch.float64, attn_implementation="eager").eval()
        self.reference = load(reference_dir, dtype=torch.float64, attn_implementation="eager")
        self.critic = self.policy if shared_trunk else load(policy_dir, dtype=torch.float64).eval()
        self.head = nn.Linear(self.policy.config.hidden_size, 1).double()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        policy = list(self.policy.parameters())
        if self.critic is self.policy:
            return policy + list(self.head.parameters()), []
        return policy, list(self.critic.model.parameters()) + list(self.head.parameters())


def response_views(
    models: PlainModels, batch: PPOBatch, row: int, temperature: float
) -> dict[str, Tensor]:
    """Log-probabilities, entropy and values ``[R]`` of one sample, from whole padded rows."""
    prompt, length = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
    ids = torch.tensor(batch.input_ids[row : row + 1]).long()
    mask = (torch.arange(ids.shape[1]) < prompt + length)[None].long()
    where = torch.arange(prompt - 1, prompt - 1 + length)
    chosen = ids[0, where + 1]

    def log_distribution(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[0, where] / temperature
        return torch.log_softmax(logits, -1)

    policy = log_distribution(models.policy)
    with torch.no_grad():
        reference = log_distribution(models.reference)
    states = models.critic.model(input_ids=ids, attention_mask=mask).last_hidden_state[0, where]
    index = torch.arange(length)
    return {
        "logprobs": policy[index, chosen],
        "reference": reference[index, chosen],
        "entropy": -(policy.exp() * policy).sum(-1),
        "values": models.head(states)[:, 0],
    }


def plain_advantages(
    rewards: list[list[float]], values: list[list[float]], groups: list[int], config: PPOConfig
) -> tuple[list[list[float]], list[list[float]]]:
    if config.advantage != "gae":
        without = plain_estimates(rewards, groups, config)
        plus_plus = config.advantage.startswith("reinforce_plus_plus")
        return (_whiten(without) if plus_plus else without), values
    if config.whiten_rewards:
        rewards = _whiten(rewards, keep_mean=True)
    advantages, returns = [], []
    for r, v in zip(rewards, values, strict=True):
        following = [*v[1:], 0.0]
        deltas = [r[t] + config.gamma * following[t] - v[t] for t in range(len(r))]
        decay = config.gamma * config.lam
        advantages.append(
            [sum(decay ** (u - t) * deltas[u] for u in range(t, len(r))) for t in range(len(r))]
        )
        returns.append([a + x for a, x in zip(advantages[-1], v, strict=True)])
    return (_whiten(advantages) if config.whitens_advantages else advantages), returns


def plain_estimates(
    rewards: list[list[float]], groups: list[int], config: PPOConfig
) -> list[list[float]]:
    """Advantages without a critic, before any whitening, response by response."""
    totals = [sum(row) for row in rewards]
    result = []
    for i, row in enumerate(rewards):
        mates = [j for j in range(len(rewards)) if groups[j] == groups[i]]
        group = [totals[j] for j in mates]
        others = [totals[j] for j in mates if j != i]
        mean = statistics.mean(group)
        to_go = [
            sum(config.gamma ** (u - t) * row[u] for u in range(t, len(row)))
            for t in range(len(row))
        ]
        if config.advantage == "reinforce_plus_plus":
            result.append(to_go)
        elif config.advantage == "reinforce_plus_plus_baseline":
            last = len(row) - 1
            result.append([to_go[t] - config.gamma ** (last - t) * mean for t in range(len(row))])
        elif config.advantage == "rloo":
            one = totals[i] - statistics.mean(others) if others else 0.0
            result.append([one] * len(row))
        else:
            one = totals[i] - mean
            if config.group_std:
                one /= (statistics.stdev(group) if others else 1.0) + 1e-6
            result.append([one] * len(row))
    return result


def _whiten(rows: list[list[float]], keep_mean: bool = False) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    scale = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    return [[(x - mean) / scale + (mean if keep_mean else 0.0) for x in row] for row in rows]


def plain_iteration(
    models: PlainModels, batch: PPOBatch, config: PPOConfig, temperature: float, seed: int
) -> dict[str, float]:
    """One PPO iteration in place. Returns the sequence KL and the mean entropy before it."""
    count = len(batch)
    lengths = batch.response_lengths.tolist()
    with torch.no_grad():
        before = [response_views(models, batch, row, temperature) for row in range(count)]
    kl_coef = 0.0 if config.kl.where == "off" else config.kl.coef
    rewards = []
    for row, view in enumerate(before):
        d = (view["logprobs"] - view["reference"]).tolist()
        penalty = {
            "k1": d,
            "k2": [x * x / 2 for x in d],
            "k3": [math.exp(-x) - 1 + x for x in d],
        }.get(config.kl.estimator, d)
        coef = kl_coef if config.kl.where == "reward" else 0.0
        rewards.append(
            [float(batch.rewards[row, t]) - coef * penalty[t] for t in range(lengths[row])]
        )
    values = [view["values"].tolist() for view in before]
    advantages, returns = plain_advantages(rewards, values, batch.groups.tolist(), config)
    policy_parameters, critic_parameters = models.parameters()
    if config.advantage != "gae":
        critic_parameters = []
    optimizers = [(_adamw(policy_parameters, config.policy), policy_parameters, config.policy)]
    if critic_parameters:
        optimizers.append(
            (_adamw(critic_parameters, config.critic), critic_parameters, config.critic)
        )
    for epoch in range(config.epochs):
        for rows in minibatch_rows(count, config.minibatches, seed=seed, update=0, epoch=epoch):
            by_token = config.loss_aggregation == "token_mean"
            divisor = sum(lengths[row] for row in rows) if by_token else len(rows)
            total = torch.zeros((), dtype=torch.float64)
            for row in rows.tolist():
                now = response_views(models, batch, row, temperature)
                one = _sample_loss(
                    now,
                    before[row],
                    torch.tensor(advantages[row], dtype=torch.float64),
                    torch.tensor(returns[row], dtype=torch.float64),
                    torch.tensor(batch.engine_logprobs[row, : lengths[row]]).double(),
                    kl_coef if config.kl.where == "loss" else 0.0,
                    config,
                    _value_coef(config),
                )
                total = total + (one if by_token else one / lengths[row])
            for optimizer, _, _ in optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(total / divisor)
            for optimizer, parameters, options in optimizers:
                nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
                optimizer.step()
    differences = [(view["logprobs"] - view["reference"]).sum() for view in before]
    entropies = torch.cat([view["entropy"] for view in before])
    return {
        "kl_sequence": float(torch.stack(differences).mean()),
        "entropy": float(entropies.mean()),
    }


def _value_coef(config: PPOConfig) -> float:
    if config.advantage != "gae":
        return 0.0
    return config.value_loss_coef if config.shared_trunk else 1.0


def _sample_loss(
    now: dict[str, Tensor],
    before: dict[str, Tensor],
    advantages: Tensor,
    returns: Tensor,
    engine: Tensor,
    kl_coef: float,
    config: PPOConfig,
    value_coef: float,
) -> Tensor:
    """Sum over one sample's tokens of policy loss, KL, entropy bonus and value loss."""
    total = torch.zeros((), dtype=torch.float64)
    high = config.clip_high or config.clip
    for t in range(len(advantages)):
        ratio = torch.exp(now["logprobs"][t] - before["logprobs"][t])
        limited = torch.clamp(ratio, 1 - config.clip, 1 + high)
        loss = torch.max(-advantages[t] * ratio, -advantages[t] * limited)
        if config.dual_clip is not None and advantages[t] < 0:
            loss = torch.min(loss, -advantages[t] * config.dual_clip)
        if config.importance_cap is not None:
            weight = math.exp(float(before["logprobs"][t] - engine[t]))
            loss = loss * min(weight, config.importance_cap)
        d = now["logprobs"][t] - now["reference"][t]
        loss = loss + kl_coef * d**2 / 2 - config.entropy_coef * now["entropy"][t]
        old, new = before["values"][t], now["values"][t]
        near = old + torch.clamp(new - old, -config.value_clip, config.value_clip)
        error = torch.max((new - returns[t]) ** 2, (near - returns[t]) ** 2)
        total = total + loss + value_coef * 0.5 * error
    return total


def _adamw(parameters: list[Tensor], options: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
