"""Trajectories and scores become one batch, and a batch becomes token-budget micro-batches.

Shapes: B samples, T tokens (prompt then response, padded on the right), R response positions.
Masks come from lengths only, so a pad id that is also EOS does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from actors.trajectory import Float32Array, Int32Array, Trajectory
from learner.config import LengthPenaltyConfig, PPOConfig
from reward_service.score import Score

# What a micro-batch costs beside its tokens (Python, kernel launches), in tokens' worth of work.
# Measured with Llamas of 1 and 5 million parameters on two cores; little depends on it.
MICRO_BATCH_OVERHEAD_TOKENS = 96

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PPOBatch:
    """One PPO iteration's samples, in an order that does not depend on who finished first.

    Attributes:
        input_ids: ``[B, T]`` prompt, response, right padding.
        prompt_lengths: ``[B]``.
        response_lengths: ``[B]``, each at least 1.
        engine_logprobs: ``[B, R]`` the rollout engine's log-probability of each response token.
        rewards: ``[B, R]`` clipped score per position, before any KL: on the last generated
            token, or per token.
        scores: ``[B]`` the score as the reward gave it.
        stopped: ``[B]`` whether the response ended with EOS rather than at the length limit.
        groups: ``[B]`` which prompt the response is to, numbered 0, 1, ...
    """

    input_ids: Int32Array
    prompt_lengths: Int32Array
    response_lengths: Int32Array
    engine_logprobs: Float32Array
    rewards: Float32Array
    scores: Float32Array
    stopped: BoolArray
    groups: Int32Array

    def __post_init__(self) -> None:
        samples = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(samples.values())) != 1 or not len(self.input_ids):
            raise ValueError(f"a PPO batch needs equally many samples, at least 1: {samples}")
        if int((self.prompt_lengths + self.response_lengths).max()) > self.input_ids.shape[1]:
            raise ValueError("a PPO batch has samples that are longer than its input_ids")
        if int(self.response_lengths.max()) > self.rewards.shape[1]:
            raise ValueError("a PPO batch has responses that are longer than its rewards")
        if min(self.prompt_lengths.min(), self.response_lengths.min()) < 1:
            raise ValueError("a PPO batch has a prompt or a response without tokens")
        mask = np.arange(self.rewards.shape[1]) < self.response_lengths[:, None]  # [B, R]
        if self.rewards[~mask].any():
            raise ValueError("a PPO batch has a reward beyond the end of its response")
        for name in ("rewards", "engine_logprobs"):
            if not np.isfinite(getattr(self, name)[mask]).all():
                raise ValueError(f"a PPO batch has {name} that are not finite")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def columns(self) -> dict[str, npt.NDArray[np.generic]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def response_tokens(self) -> int:
        return int(self.response_lengths.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreScale:
    """What a score is multiplied by, and what is added then, before anything else is done."""

    gain: float = 1.0
    bias: float = 0.0

    @classmethod
    def of_first_step(cls, scores: Sequence[Score], config: PPOConfig) -> ScoreScale:
        """Gives these scores mean 0 and standard deviation 1 if ``config`` says so.

        They come from the policy as it was before PPO. Scores that are all alike are only shifted.
        """
        if not config.normalize_scores or not scores:
            return cls()
        values = np.array([score.value for score in scores], np.float64)
        values.sort()  # the sum does not depend on who finished first
        std = float(values.std())
        gain = 1 / std if std > 0 else 1.0
        return cls(gain=gain, bias=-float(values.mean()) * gain)


UNSCALED = ScoreScale()


def build_batch(
    trajectories: Sequence[Trajectory],
    scores: Sequence[Score],
    config: PPOConfig,
    scale: ScoreScale = UNSCALED,
    pad_token_id: int = 0,
) -> PPOBatch:
    """Lay samples and their scores out as arrays, sorted by sample id.

    Scores are matched by ``sample_id``; they may come in another order as long as ids are unique.
    The score is scaled and clipped to ``+-config.score_clip`` (each token's when they are per
    token), and ``config.length_penalty`` is added at the last token. Then ``config.truncated``
    says what a response cut off by the length limit gets: the score as it is, the score plus
    ``truncated_value``, or ``truncated_value`` instead of score and length penalty.

    Raises:
        ValueError: If samples and scores do not match, per-token rewards have another length
            than the response, or a sample should have been filtered (``learner.sample_filter``).
    """
    matched = _match(trajectories, scores)
    matched.sort(key=lambda pair: (pair[0].prompt.prompt_id, pair[0].sample_index))
    prompt_lengths = np.array([len(t.prompt.token_ids) for t, _ in matched], np.int32)
    response_lengths = np.array([len(t.response_ids) for t, _ in matched], np.int32)
    rows, width = len(matched), int(response_lengths.max())
    total = int((prompt_lengths + response_lengths).max())
    input_ids = np.full((rows, total), pad_token_id, np.int32)
    engine_logprobs = np.zeros((rows, width), np.float32)
    rewards = np.zeros((rows, width), np.float32)
    for row, (trajectory, score) in enumerate(matched):
        prompt, response = int(prompt_lengths[row]), int(response_lengths[row])
        input_ids[row, :prompt] = trajectory.prompt.token_ids
        input_ids[row, prompt : prompt + response] = trajectory.response_ids
        engine_logprobs[row, :response] = trajectory.response_logprobs
        rewards[row, :response] = place_score(trajectory, score, config, scale)
    return PPOBatch(
        input_ids=input_ids,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        engine_logprobs=engine_logprobs,
        rewards=rewards,
        scores=np.array([score.value for _, score in matched], np.float32),
        stopped=np.array([t.finish_reason == "stop" for t, _ in matched], np.bool_),
        groups=group_numbers([t for t, _ in matched]),
    )


def group_numbers(trajectories: Sequence[Trajectory]) -> Int32Array:
    """``[B]`` the prompt of each trajectory, numbered in the order of the prompts' ids."""
    names = [trajectory.prompt.prompt_id for trajectory in trajectories]
    number = {name: index for index, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], np.int32)


def place_score(
    trajectory: Trajectory, score: Score, config: PPOConfig, scale: ScoreScale = UNSCALED
) -> Float32Array:
    """``[R]`` the scaled and clipped score at the position or positions it belongs to."""
    length = len(trajectory.response_ids)
    placed = np.zeros(length, np.float32)
    if score.per_token is None:
        last = np.zeros(length, np.bool_)
        last[-1] = True
        assert last.sum() == 1, "a sequence reward stands on exactly one token"
        value = score.value * scale.gain + scale.bias
        placed[last] = np.clip(value, -config.score_clip, config.score_clip)
    elif len(score.per_token) != length:
        raise ValueError(
            f"sample {score.sample_id}: {len(score.per_token)} per-token rewards for a response "
            f"of {length} tokens; a reward gives one number, or one for each response token"
        )
    else:
        values = np.asarray(score.per_token, np.float64) * scale.gain
        values[-1] += scale.bias  # so that their sum is the scaled score
        placed[:] = np.clip(values, -config.score_clip, config.score_clip)
    if config.length_penalty is not None:
        placed[-1] += overlong_penalty(length, config.length_penalty)
    if trajectory.finish_reason == "length":
        if config.truncated == "filter":
            raise ValueError(
                f"sample {trajectory.sample_id} was cut off by the length limit and ppo.truncated "
                "is 'filter': take such samples out before a batch is built (sample_filter)"
            )
        if config.truncated == "penalty":
            placed[-1] += config.truncated_value
        elif config.truncated == "fixed":
            placed[:] = 0.0
            placed[-1] = config.truncated_value
    return placed


def overlong_penalty(length: int, config: LengthPenaltyConfig) -> float:
    """Soft overlong punishment of a response of ``length`` tokens (arXiv 2503.14476, eq. 13).

    0 up to ``max_tokens - cache_tokens``, from there linearly down to ``-factor`` at
    ``max_tokens``, and ``-factor`` beyond.
    """
    excess = length - (config.max_tokens - config.cache_tokens)
    return -config.factor * min(max(excess / config.cache_tokens, 0.0), 1.0)


def _match(
    trajectories: Sequence[Trajectory], scores: Sequence[Score]
) -> list[tuple[Trajectory, Score]]:
    if not trajectories:
        raise ValueError("there is no sample to train on: every generation or score failed")
    if len(trajectories) != len(scores):
        raise ValueError(f"{len(trajectories)} samples came with {len(scores)} scores")
    if all(t.sample_id == s.sample_id for t, s in zip(trajectories, scores, strict=True)):
        return list(zip(trajectories, scores, strict=True))
    by_id = {score.sample_id: score for score in scores}
    missing = [t.sample_id for t in trajectories if t.sample_id not in by_id]
    if missing:
        raise ValueError(f"{len(missing)} samples have no score, the first is {missing[0]!r}")
    if len(by_id) != len(scores):
        raise ValueError("scores that come in another order than the samples need unique ids")
    return [(t, by_id[t.sample_id]) for t in trajectories]


def minibatch_rows(
    samples: int, minibatches: int, *, seed: int, update: int, epoch: int
) -> list[Int64Array]:
    """The rows of each optimizer step of one epoch: a fresh shuffle, cut into near-equal parts.

    A pure function of its arguments, so every learner draws the same and a resumed run as well.
    """
    order = np.random.default_rng([seed, update, epoch]).permutation(samples)
    return np.array_split(order, min(minibatches, samples))


def split_over_ranks(rows: Int64Array, lengths: Int32Array, ranks: int) -> list[Int64Array]:
    """Share rows out so that every rank gets about equally many tokens (longest first, each to
    the rank with the least so far). With fewer rows than ranks some shares are empty."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows.tolist(), key=lambda row: (-int(lengths[row]), row)):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += int(lengths[row])
    return [np.array(share, np.int64) for share in shares]


def micro_batches(
    rows: Int64Array,
    lengths: Int32Array,
    budget: int,
    overhead: int = MICRO_BATCH_OVERHEAD_TOKENS,
) -> list[Int64Array]:
    """Cut rows, sorted by length, into the groups that cost least, longest first.

    A group costs its padded tokens (rows times longest row), at most ``budget``, plus
    ``overhead``: a group more is worth it when it saves that much padding. Exact, by dynamic
    programming over the sorted rows. A row that is longer than the budget is a group of its own.
    """
    order = rows[np.lexsort((rows, lengths[rows]))]
    sizes = lengths[order].astype(np.int64)
    count = len(order)
    best = np.zeros(count + 1, np.int64)
    start_of_last = np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        first = max(0, end - max(1, budget // int(sizes[end - 1])))
        starts = np.arange(first, end)
        costs = best[starts] + (end - starts) * sizes[end - 1] + overhead
        choice = int(np.argmin(costs))
        best[end], start_of_last[end] = costs[choice], starts[choice]
    groups = []
    end = count
    while end:
        start = int(start_of_last[end])
        groups.append(order[start:end])
        end = start
    return groups


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The rows of one forward pass: b rows of t tokens with n response tokens among them.

    The last token of a sample is never an input, since nothing is predicted from it.

    Attributes:
        input_ids: ``[b, t]``, trimmed to the longest row.
        positions: ``[n]`` index into the flattened ``[b * t]`` of the state that predicts each
            response token (and whose value is the critic's).
        targets: ``[n]`` the response tokens.
        slots: ``[n]`` index into a flattened ``[B * R]`` of each response token.
    """

    input_ids: Int64Array
    positions: Int64Array
    targets: Int64Array
    slots: Int64Array


def take_rows(
    rows: Int64Array,
    input_ids: Int32Array,
    prompt_lengths: Int32Array,
    response_lengths: Int32Array,
    max_response: int,
) -> MicroBatch:
    """Cut the given rows out of a batch of arrays shaped as those of ``PPOBatch``."""
    prompts, responses = prompt_lengths[rows].astype(np.int64), response_lengths[rows]
    # A learner without samples takes a row without response, of a prompt of one token perhaps.
    width = max(1, int((prompts + responses).max()) - 1)
    ids = input_ids[rows].astype(np.int64)
    owner = np.repeat(np.arange(len(rows)), responses)
    first = np.repeat(np.cumsum(responses) - responses, responses)
    column = np.arange(int(responses.sum())) - first
    states = prompts[owner] - 1 + column
    return MicroBatch(
        input_ids=np.ascontiguousarray(ids[:, :width]),
        positions=owner * width + states,
        targets=ids[owner, states + 1],
        slots=rows[owner] * max_response + column,
    )
