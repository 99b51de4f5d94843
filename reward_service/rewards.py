"""Rewards: anything that turns trajectories into scores, and how they combine.

A ``Reward`` never invents a value: a sample that it cannot score comes back as a
``SampleFailure`` with the reason. ``reward_service.scoring`` calls it while further samples are
still being generated, and tries again what failed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from actors.trajectory import SampleFailure, Trajectory
from reward_service.client import HttpScorer
from reward_service.config import EnsembleConfig, RewardConfig, RewardTerm
from reward_service.encoding import Truncation
from reward_service.ensemble import EnsembleScorer
from reward_service.function import RewardFunction
from reward_service.score import Score, ScoreItem, Scorer

Scored = Score | SampleFailure


class Reward(Protocol):
    """What PPO maximises."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
        """One result for each trajectory, in order.

        Raises:
            RewardUnavailable, TimeoutError: Nothing can be scored for now, as the server cannot
                be reached; trying again later makes sense.
            RuntimeError: Nothing can be scored at all, such as by a function that fails for
                every sample.
        """
        ...


class ModelReward:
    """The score of a reward model: in this process, behind a Serve handle, or behind a URL.

    A response together with its prompt may exceed the reward model's context by a token or two
    even where the policy's context held it (EOS is appended), so the oldest tokens are dropped
    unless told otherwise.
    """

    def __init__(self, scorer: Scorer, *, truncation: Truncation = "left") -> None:
        self._scorer = scorer
        self._truncation = truncation

    def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
        if not trajectories:
            return []
        items = [
            ScoreItem(prompt=t.prompt.text, messages=t.prompt.messages, response=t.response_text)
            for t in trajectories
        ]
        answer = self._scorer.score(items, self._truncation)
        version = f"{answer.model}@{answer.version}"
        results: list[Scored] = []
        rows = zip(trajectories, answer.scores, answer.errors, strict=True)
        for index, (trajectory, value, error) in enumerate(rows):
            if value is None:
                results.append(scoring_failure(trajectory, error or "no score"))
                continue
            members = {name: scores[index] for name, scores in answer.members.items()}
            results.append(
                Score(
                    sample_id=trajectory.sample_id,
                    value=value,
                    components={n: s for n, s in members.items() if s is not None},
                    model_version=version,
                )
            )
        return results


class FunctionReward:
    """A Python function of the user, called once for each sample.

    It is called as ``function(prompt=str, response=str, response_ids=list[int], meta=dict)`` and
    returns a number, or a sequence with one number for each response token.
    """

    GIVE_UP_AFTER = 4
    """A function that never worked and fails for all of so many samples is reported as broken."""

    def __init__(self, path: str) -> None:
        """Load ``package.module:function``. Raises ValueError when that cannot be called."""
        self._path = path
        self._function = RewardFunction.load(path)
        self._worked = False

    def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
        results = [self._score_one(trajectory) for trajectory in trajectories]
        failures = [result for result in results if isinstance(result, SampleFailure)]
        self._worked = self._worked or len(failures) < len(results)
        # Looked at when all have been tried: samples come in any order, and a run that is resumed
        # must not end because those that fail came first.
        if not self._worked and len(failures) >= self.GIVE_UP_AFTER:
            raise RuntimeError(
                f"the {failures[-1].reason}: it failed for all of the first {len(failures)} samples"
            )
        return results

    def _score_one(self, trajectory: Trajectory) -> Scored:
        try:
            return _to_score(trajectory, self._function(trajectory))
        except Exception as error:  # the user's code may raise anything
            return scoring_failure(
                trajectory, f"reward function {self._path}: {type(error).__name__}: {error}"
            )


class WeightedSum:
    """Σ weight · term, with the unweighted value of each term kept in ``components``.

    When any term gives per-token rewards so does the sum; a term that belongs to the sequence as
    a whole then lands on its last token. A sample that one term cannot score has no sum.
    """

    def __init__(self, terms: Sequence[tuple[str, float, Reward]]) -> None:
        """``terms`` are (name, weight, reward), names all different."""
        names = [name for name, _, _ in terms]
        if not terms or len(set(names)) != len(names):
            raise ValueError(f"a weighted sum needs terms of different names, got {names}")
        self._terms = list(terms)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
        if len(self._terms) == 1:
            columns = [score_all(self._terms[0][0], self._terms[0][2], trajectories)]
        else:  # terms wait for servers: let them wait at the same time
            with ThreadPoolExecutor(len(self._terms)) as pool:
                columns = list(
                    pool.map(lambda term: score_all(term[0], term[2], trajectories), self._terms)
                )
        rows = zip(*columns, strict=True)
        return [self._sum(t, row) for t, row in zip(trajectories, rows, strict=True)]

    def _sum(self, trajectory: Trajectory, row: Sequence[Scored]) -> Scored:
        scores: list[Score] = []
        for (name, _, _), result in zip(self._terms, row, strict=True):
            if isinstance(result, SampleFailure):
                return scoring_failure(trajectory, f"term {name!r}: {result.reason}")
            scores.append(result)
        weights = [weight for _, weight, _ in self._terms]
        weighted = list(zip(weights, scores, strict=True))
        value = sum(weight * score.value for weight, score in weighted)
        per_token = None
        if any(score.per_token is not None for score in scores):
            total = np.zeros(len(trajectory.response_ids), np.float64)  # [R]
            for weight, score in weighted:
                if score.per_token is None:
                    total[-1] += weight * score.value
                else:
                    total += weight * score.per_token.astype(np.float64)
            per_token = total.astype(np.float32)
        try:
            return Score(
                sample_id=trajectory.sample_id,
                value=value,
                per_token=per_token,
                components={
                    part: part_value
                    for (name, _, _), score in zip(self._terms, scores, strict=True)
                    for part, part_value in {**score.components, name: score.value}.items()
                },
                model_version=",".join(s.model_version for s in scores if s.model_version),
            )
        except ValueError as error:  # weights so large that the sum overflows
            return scoring_failure(trajectory, str(error))


def build_reward(config: RewardConfig, scorers: Mapping[str, Scorer] | None = None) -> WeightedSum:
    """The reward that a configuration describes.

    Args:
        scorers: For each term with a ``model``, by the term's name, what scores it
            (``RewardService.scorers()``).

    Raises:
        ValueError: No terms, a model term without a scorer, a bad URL, a function that cannot
            be loaded.
    """
    if not config.terms:
        raise ValueError("reward.terms is empty: give at least one model, url or function")
    return WeightedSum([(t.name, t.weight, _build_term(t, config, scorers)) for t in config.terms])


def _build_term(
    term: RewardTerm, config: RewardConfig, scorers: Mapping[str, Scorer] | None
) -> Reward:
    if term.function is not None:
        return FunctionReward(term.function)
    if term.url is not None:
        return ModelReward(_remote_scorer(term, term.url, config))
    found = scorers or {}
    missing = sorted(set(term.members) - set(found))
    if missing:
        raise ValueError(
            f"reward term {term.name!r} needs {missing}, but the reward service serves "
            f"{sorted(found)}"
        )
    members = [found[name] for name in term.members]
    if term.models is None:
        return ModelReward(members[0])
    ensemble = EnsembleConfig(
        members=tuple(term.members), combine=term.combine, penalty=term.penalty
    )
    return ModelReward(EnsembleScorer(term.name, members, ensemble))


def _remote_scorer(term: RewardTerm, url: str, config: RewardConfig) -> HttpScorer:
    token = None
    if term.token_env is not None:
        token = os.environ.get(term.token_env)
        if not token:
            raise ValueError(
                f"reward term {term.name!r}: the environment variable {term.token_env}, which "
                "should hold the token for its url, is not set"
            )
    service = config.service
    return HttpScorer(
        url,
        model=term.served_model,
        timeout_s=service.timeout_s,
        max_retries=service.max_retries,
        format=term.format,
        token=token,
    )


def score_all(name: str, reward: Reward, trajectories: Sequence[Trajectory]) -> list[Scored]:
    """What ``reward`` says, checked to be one result for each trajectory, in order.

    Raises:
        RuntimeError: It lost results or mixed them up.
        Whatever ``reward`` raises.
    """
    results = reward.score(trajectories)
    if len(results) != len(trajectories):
        raise RuntimeError(
            f"reward {name!r} gave {len(results)} results for {len(trajectories)} samples"
        )
    for trajectory, result in zip(trajectories, results, strict=True):
        if result.sample_id != trajectory.sample_id:
            raise RuntimeError(
                f"reward {name!r} mixed its results up: it gave that of {result.sample_id} for "
                f"sample {trajectory.sample_id}"
            )
    return results


def scoring_failure(trajectory: Trajectory, reason: str) -> SampleFailure:
    return SampleFailure(
        prompt=trajectory.prompt,
        sample_index=trajectory.sample_index,
        stage="scoring",
        reason=reason,
        response=trajectory.response_text,
    )


def _to_score(trajectory: Trajectory, value: object) -> Score:
    """What a function returned as a Score. Raises ValueError or TypeError when it is neither."""
    if value is None or isinstance(value, bool | str):
        raise TypeError(f"it must return a number or a list of numbers, not {type(value).__name__}")
    array = np.asarray(value, np.float64)
    if array.ndim > 1:
        raise TypeError(
            f"it must return a number or a list of numbers, not {array.ndim} dimensions"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"it returned {'a list with ' if array.ndim else ''}NaN or infinity")
    if array.ndim == 0:
        return Score(sample_id=trajectory.sample_id, value=float(array))
    tokens = len(trajectory.response_ids)
    if len(array) != tokens:
        raise ValueError(f"it returned {len(array)} rewards for {tokens} response tokens")
    return Score(
        sample_id=trajectory.sample_id,
        value=float(array.sum()),
        per_token=array.astype(np.float32),
    )
