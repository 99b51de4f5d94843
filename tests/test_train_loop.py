"""The PPO loop on real parts: vLLM actor, scoring, LearnerGroup, verified weights, three seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.prompts import PromptStream
from actors.rollout import RolloutPool
from actors.trajectory import Prompt, SampleFailure, Trajectory
from cluster.step import Sample, Step
from cluster.train import train
from learner.batch import ScoreScale
from learner.config import KLConfig, LearnersConfig, OptimizerConfig, PPOConfig
from learner.group import PPOLearners
from reward_service.score import Score
from tests.conftest import make_llama

STEPS = 12
SAMPLING = SamplingConfig(max_new_tokens=8, samples_per_prompt=4)
PPO = PPOConfig(
    steps=STEPS,
    prompts_per_step=32,
    epochs=2,
    minibatches=4,
    kl=KLConfig(coef=0.02),
    policy=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.999), schedule="constant"),
    critic=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.999)),
)
# The other estimators on the same task, each as its paper combines it; a few steps show it.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {
        "kl": {"where": "loss", "estimator": "k3_st_k2", "coef": 0.02},
        "loss_aggregation": "sequence_mean",
        "dynamic_sampling": {"max_extra_rounds": 2},
    },
    "rloo": {},
    "reinforce_plus_plus": {},
    "reinforce_plus_plus_baseline": {"kl": {"where": "loss", "estimator": "k2", "coef": 0.02}},
}
FEW_STEPS = 10


class LowIds:
    """Share of response ids below 256, about a half for an untrained model."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score | SampleFailure]:
        return [
            Score(sample_id=t.sample_id, value=float(np.mean(t.response_ids < 256)))
            for t in trajectories
        ]


class Log:
    def __init__(self) -> None:
        self.next_step = 0
        self.scale: ScoreScale | None = None
        self.ahead: Step | None = None
        self.steps: list[Mapping[str, float]] = []
        self.versions: list[set[int]] = []
        self.warnings: list[str] = []
        self.timeline: list[dict[str, Any]] = []

    def set_aside(self, step: int, failures: Sequence[SampleFailure]) -> None:
        assert not failures

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        self.steps.append(metrics)
        self.versions.append({int(v) for s in samples for v in s.trajectory.policy_versions})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nearly uniform policy, so that a dozen steps are enough to see it learn."""
    return make_llama(tmp_path_factory.mktemp("uniform"), tied=True, spread=0.05)


@pytest.fixture(scope="module")
def pool(ray_session: None, model: Path) -> Iterator[RolloutPool]:
    config = RolloutConfig(engine=EngineConfig(max_num_seqs=128, kv_cache_gib=0.1))
    with RolloutPool(model, config) as started:
        yield started


def run(pool: RolloutPool, model: Path, seed: int, ppo: PPOConfig = PPO) -> Log:
    rng = np.random.default_rng(seed)
    prompts = [
        Prompt(
            prompt_id=f"p{i}",
            token_ids=rng.integers(3, 512, rng.integers(3, 9)).astype(np.int32),
            text="",
        )
        for i in range(48)
    ]
    log = Log()
    pool.load_checkpoint(model, version=0)
    with PPOLearners(
        ppo, LearnersConfig(num_learners=0), model, model, None, 1.0, ppo.steps, seed
    ) as learners:
        assert train(
            ppo,
            SAMPLING,
            prompts=PromptStream(prompts, ppo.prompts_per_step, seed),
            rollouts=pool,
            reward=LowIds(),
            learners=learners,
            log=log,
            seed=seed,
            measure=lambda _: {},
            stop=lambda: False,
            progress=lambda *_: None,
            warn=log.warnings.append,
            timeline=lambda step, clock: log.timeline.append(clock.row(step)),
        )
    return log


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_and_the_engine_agrees_with_the_learner(
    pool: RolloutPool, model: Path, seed: int
) -> None:
    log = run(pool, model, seed)
    rewards = [m["reward/mean"] for m in log.steps]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.2, rewards
    assert 0.0 < log.steps[-1]["ppo/kl_sequence"] < 16.0
    # Every token of a step comes from the version that the step before left.
    assert log.versions == [{step} for step in range(STEPS)]
    for metrics in log.steps:
        assert metrics["ppo/engine_delta_mean"] < 1e-4
        assert metrics["ppo/effective_sample_size"] > 0.999
        assert metrics["ppo/engine_correlation"] > 0.9999
        assert 0 < metrics["weights/probe_error_max"] < 1e-4
        assert metrics["weights/reloads"] == 0
        assert metrics["weights/megabytes"] == pytest.approx(131_392 * 4 / 1e6)
        assert 0 < metrics["weights/seconds_checksum"] < metrics["seconds/broadcast"]
        assert 0 < metrics["weights/verify_share"] < 1
        assert metrics["ppo/first_log_ratio_max"] == 0.0
        assert metrics["samples/submitted"] == 128
        assert metrics["samples/submitted"] == (
            metrics["samples/trained"] + metrics["samples/filtered"] + metrics["samples/failed"]
        )
    assert log.steps[0]["ppo/kl_sequence"] == pytest.approx(0.0, abs=1e-5)
    assert log.warnings == []
    check_timeline(log)


def test_the_next_step_is_generated_while_this_one_is_learned(
    pool: RolloutPool, model: Path
) -> None:
    ppo = PPO.model_copy(update={"max_staleness": 1})
    log = run(pool, model, seed=0, ppo=ppo)
    rewards = [m["reward/mean"] for m in log.steps]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.2, rewards
    # All of a step from the version before the last; the first two from the only one there is.
    assert log.versions == [{max(0, step - 1)} for step in range(STEPS)]
    first, *later = log.steps
    assert first["ppo/engine_delta_mean"] < 1e-4
    for metrics in later:
        assert "ppo/engine_delta_mean" not in metrics
        assert 1e-3 < metrics["ppo/stale_delta_mean"] < 1.0  # an update's change, not rounding
        assert 0.5 < metrics["ppo/stale_sample_size"] <= 1.0
    for metrics in log.steps:
        assert 0 < metrics["weights/probe_error_max"] < 1e-4
        assert metrics["samples/submitted"] == metrics["samples/trained"] == 128
    assert log.warnings == []
    assert log.ahead is None, "nothing is generated beyond the last step"
    for row in log.timeline[:-1]:
        spans = {(lane, what): (start, end) for lane, what, start, end in row["spans"]}
        began, ended = spans["driver", "learn"]
        assert began - 0.05 <= spans["rollout-0", "generate"][0] < ended
    # The same again: who was faster has no say in it.
    assert [m["ppo/kl_sequence"] for m in run(pool, model, seed=0, ppo=ppo).steps] == [
        m["ppo/kl_sequence"] for m in log.steps
    ]


def check_timeline(log: Log) -> None:
    """Every part that worked in a step is in its lane, inside the phase that waited for it."""
    assert [row["step"] for row in log.timeline] == list(range(1, STEPS + 1))
    for row, metrics in zip(log.timeline, log.steps, strict=True):
        spans = {(lane, what): (start, end) for lane, what, start, end in row["spans"]}
        phases = {what: end - start for (lane, what), (start, end) in spans.items()
                  if lane == "driver"}  # fmt: skip
        for phase in ("generate", "learn", "broadcast"):
            assert phases[phase] == pytest.approx(metrics[f"seconds/{phase}"], abs=2e-3)
        inside = {
            "generate": [("rollout-0", "generate"), ("reward", "score")],
            "learn": [("learners", "annotate"), ("learners", "epochs")],
            "broadcast": [("learners", "export"), ("rollout-0", "load"), ("rollout-0", "probe")],
        }
        for phase, parts in inside.items():
            began, ended = spans["driver", phase]
            for part in parts:
                assert began - 1e-3 <= spans[part][0] <= spans[part][1] <= ended + 1e-3, part


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_estimators_without_a_critic_learn_as_well(
    pool: RolloutPool, model: Path, advantage: str
) -> None:
    changes = {"advantage": advantage, "steps": FEW_STEPS, **ESTIMATORS[advantage]}
    log = run(pool, model, seed=0, ppo=PPOConfig.model_validate(PPO.model_dump() | changes))
    rewards = [m["reward/mean"] for m in log.steps]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.15, rewards
    for metrics in log.steps:
        assert not [name for name in metrics if "critic" in name or "value" in name]
        assert metrics["ppo/first_log_ratio_max"] == 0.0
        assert metrics["samples/submitted"] == (
            metrics["samples/trained"] + metrics["samples/filtered"] + metrics["samples/failed"]
        )
    if "dynamic_sampling" in ESTIMATORS[advantage]:
        assert max(m["samples/filtered_no_spread"] for m in log.steps if m["samples/filtered"]) >= 4
        assert all(m["ppo/groups_without_spread"] == 0 for m in log.steps)


def test_a_step_with_too_few_good_samples_stops_the_run() -> None:
    prompt = Prompt(prompt_id="p", token_ids=np.array([3], np.int32), text="x")
    failures = [
        SampleFailure(prompt=prompt, sample_index=i, stage="scoring", reason="NaN")
        for i in range(3)
    ]
    ids = ["p#0", "p#1", "p#2"]
    with pytest.raises(RuntimeError, match=r"3 of 3 samples.*scoring: NaN"):
        Step(submitted=ids, failures=failures).check_accounts(0.5)
    with pytest.raises(RuntimeError, match=r"do not balance: 4 samples .*unknown: p#3"):
        Step(submitted=[*ids, "p#3"], failures=failures).check_accounts(0.5)
    with pytest.raises(RuntimeError, match=r"do not balance.*unknown: p#2"):
        Step(submitted=ids, failures=[*failures, failures[2]]).check_accounts(0.5)


def test_learners_that_trained_on_other_tokens_are_found_out() -> None:
    trajectory = Trajectory(
        prompt=Prompt(prompt_id="p", token_ids=np.array([3], np.int32), text="x"),
        sample_index=0,
        response_ids=np.array([5, 6, 2], np.int32),
        response_logprobs=np.zeros(3, np.float32),
        policy_versions=np.zeros(3, np.int32),
        response_text="",
        finish_reason="stop",
        seed=0,
    )
    sample = Sample(trajectory=trajectory, score=Score(sample_id="p#0", value=0.0), measured={})
    step = Step(submitted=["p#0"], samples=[sample])
    step.check_accounts(1.0)
    step.check_learned({"ppo/samples": 1.0, "ppo/tokens": 3.0})
    for samples, tokens in ((1.0, 4.0), (1.0, 2.0), (2.0, 3.0)):
        with pytest.raises(RuntimeError, match=r"but the step has 3 of 1: masks or lengths"):
            step.check_learned({"ppo/samples": samples, "ppo/tokens": tokens})
