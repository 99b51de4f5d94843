"""Which setting makes engine and learner disagree? One is changed at a time, until they agree.

Each trial starts an engine of its own in a fresh process, samples the same prompts with the same
seeds, and holds the log-probabilities that it sampled with against the learner's, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from actors.config import EngineConfig
from actors.engine import FIXED_ARGUMENTS, VLLMEngine
from actors.environment import engine_environment
from actors.generation import Completion, SampleRequest
from actors.trajectory import Trajectory
from cluster.config import RunConfig
from learner.config import DriftConfig
from learner.group import PPOLearners

Say = Callable[[str], None]


@dataclass(frozen=True)
class Blame:
    """The setting whose change brought agreement, if one did.

    Attributes:
        setting: Its name, as the configuration or vLLM has it; empty when none helped.
        advice: What it does to log-probabilities, and what to do.
        before, after: Mean |Δ log p| without and with the change, in nats.
        tried: Every change that was tried and the mean |Δ log p| with it.
    """

    setting: str
    advice: str
    before: float
    after: float
    tried: Mapping[str, float]

    def __str__(self) -> str:
        tried = "".join(f"\n  {name:<44} {error:.3g}" for name, error in self.tried.items())
        trials = f"\nmean |Δ log p| with one change at a time:{tried}"
        if not self.setting:
            return f"No single setting is to blame. {self.advice}{trials}"
        return (
            f"To blame: {self.setting}. {self.advice} Mean |Δ log p| is {self.after:.3g} without"
            f" it, {self.before:.3g} with it.{trials}"
        )


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """How an engine is run: its configuration, vLLM arguments that differ, and the sampling."""

    config: EngineConfig
    temperature: float
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def argument(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, FIXED_ARGUMENTS.get(name, default))

    def with_argument(self, name: str, value: Any) -> EngineSetup:
        return replace(self, arguments={**self.arguments, name: value})

    def with_config(self, **changes: Any) -> EngineSetup:
        return replace(self, config=self.config.model_copy(update=changes))


def changes(setup: EngineSetup) -> Iterator[tuple[str, str, EngineSetup]]:
    """Setting, advice and changed setup, most likely first; what is as it should be is left out."""
    if setup.config.dtype != "float32":
        yield (
            f"rollout.engine.dtype {setup.config.dtype}",
            "Half precision rounds log-probabilities to about 0.01 nats. Use float32, or raise"
            " the thresholds (ppo.drift, rollout.probe_tolerance) and set ppo.importance_cap to 2.",
            setup.with_config(dtype="float32"),
        )
    if setup.argument("logprobs_mode") != "processed_logprobs":
        yield (
            f"vLLM's logprobs_mode {setup.argument('logprobs_mode')}",
            "Raw log-probabilities leave out temperature and filters, which the sampling had:"
            " processed_logprobs are those of the distribution that was sampled from.",
            setup.with_argument("logprobs_mode", "processed_logprobs"),
        )
    if setup.argument("generation_config") != "vllm":
        yield (
            f"vLLM's generation_config {setup.argument('generation_config')}",
            "The checkpoint's own sampling defaults (top-k, top-p, penalties) shape the"
            " distribution: set it to vllm, which ignores them.",
            setup.with_argument("generation_config", "vllm"),
        )
    if setup.argument("enable_chunked_prefill"):
        yield (
            "vLLM's enable_chunked_prefill",
            "A prompt taken in pieces is attended to differently, and on CPU draws from its"
            " seeded generator too often.",
            setup.with_argument("enable_chunked_prefill", False),
        )
    if setup.argument("enable_prefix_caching", True):
        yield (
            "vLLM's enable_prefix_caching",
            "Keys and values of an earlier prompt are used again: they were computed with other"
            " weights, or in another precision.",
            setup.with_argument("enable_prefix_caching", False),
        )
    if setup.config.max_num_seqs != 1:
        yield (
            f"rollout.engine.max_num_seqs {setup.config.max_num_seqs}",
            "Log-probabilities depend on what else is in the batch: a kernel is not"
            " batch-invariant.",
            setup.with_config(max_num_seqs=1),
        )
    if not setup.config.enforce_eager:
        yield (
            "rollout.engine.enforce_eager false",
            "The compiled model computes something else than the eager one.",
            setup.with_config(enforce_eager=True),
        )
    if setup.temperature != 1.0:
        yield (
            f"sampling.temperature {setup.temperature:g}",
            "Engine and learner do not apply it alike (to the logits, before the softmax).",
            replace(setup, temperature=1.0),
        )


WEIGHT_TRANSFER = (
    "weight transfer (actors/weight_transfer.py)",
    "An engine that reads the same weights from disk agrees, so an update leaves something of the"
    " old weights behind, such as the packed copy of a tied output layer.",
)
LEARNER_PRECISION = (
    "ppo.bf16",
    "The learner's autocast rounds to about 0.01 nats; in float32 it agrees with the engine. Switch"
    " it off, or raise ppo.drift's thresholds and set ppo.importance_cap to 2.",
)
NOBODY = (
    "Look at what the model's code does in vLLM and in Transformers: attention, rotary positions,"
    " its version of both."
)


def find_culprit(
    config: RunConfig,
    trajectories: Sequence[Trajectory],
    learners: PPOLearners,
    say: Say,
    *,
    measured: float,
    setup: EngineSetup | None = None,
) -> Blame:
    """Change one setting at a time until engine and learner agree.

    Args:
        trajectories: What the engine in question sampled and with which log-probabilities.
        measured: Mean |Δ log p| that the learner found as it is configured, in nats.
        setup: How that engine is run; by default as ``config`` has it.
    """
    assert config.ppo is not None
    limits = config.ppo.drift_limits
    temperature = config.sampling.temperature
    setup = setup or EngineSetup(config=config.rollout.engine, temperature=temperature)
    tried: dict[str, float] = {}
    if config.ppo.bf16:
        errors = disagreement(trajectories, learners, temperature)
        tried["without ppo.bf16"] = float(errors.mean())
        if agree(errors, limits):
            return Blame(*LEARNER_PRECISION, measured, tried["without ppo.bf16"], tried)
    for setting, advice, changed in [(*WEIGHT_TRANSFER, setup), *changes(setup)]:
        say(f"trying without {setting}")
        sampled = sample_again(config, changed, trajectories)
        errors = disagreement(sampled, learners, changed.temperature)
        tried[f"without {setting}"] = float(errors.mean())
        if agree(errors, limits):
            return Blame(setting, advice, measured, float(errors.mean()), tried)
    return Blame("", NOBODY, measured, measured, tried)


def agree(errors: npt.NDArray[np.float64], limits: DriftConfig) -> bool:
    """Whether |Δ log p| of all tokens are within the warning thresholds."""
    within_mean = limits.warn_mean is None or bool(errors.mean() <= limits.warn_mean)
    return within_mean and (limits.warn_max is None or bool(errors.max() <= limits.warn_max))


def disagreement(
    trajectories: Sequence[Trajectory], learners: PPOLearners, temperature: float
) -> npt.NDArray[np.float64]:
    """|Δ log p| of every response token against the learner in float32, in nats."""
    sequences = [[*t.prompt.token_ids.tolist(), *t.response_ids.tolist()] for t in trajectories]
    ours = learners.logprobs(sequences, temperature)
    errors = [
        np.abs(expected[-len(t.response_ids) :] - t.response_logprobs)
        for expected, t in zip(ours, trajectories, strict=True)
    ]
    return np.concatenate(errors, dtype=np.float64)


class TrialEngine:
    """An engine in a process of its own, which reads the model's weights from disk."""

    def __init__(self, model_dir: Path, setup: EngineSetup, eos_token_ids: Sequence[int]) -> None:
        self._engine = VLLMEngine(
            model_dir, setup.config, eos_token_ids=eos_token_ids, arguments=setup.arguments
        )

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Completions in the order of ``requests``."""
        for request in requests:
            self._engine.add(request)
        done: dict[str, Completion] = {}
        while self._engine.busy:
            done.update({c.request_id: c for c in self._engine.step()})
        return [done[request.request_id] for request in requests]


def sample_again(
    config: RunConfig, setup: EngineSetup, trajectories: Sequence[Trajectory]
) -> list[Trajectory]:
    """The same samples (prompts and seeds) from an engine that is run as ``setup`` says.

    Raises:
        TimeoutError: The engine did not answer within ``rollout.start_timeout_s``.
    """
    rollout = config.rollout
    requests = [
        SampleRequest(
            request_id=t.sample_id,
            token_ids=t.prompt.token_ids,
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=setup.temperature,
            seed=t.seed,
        )
        for t in trajectories
    ]
    engine = (
        ray.remote(TrialEngine)
        .options(
            num_cpus=rollout.num_cpus_per_actor,
            num_gpus=rollout.num_gpus_per_actor,
            resources=rollout.resources_per_actor,
            runtime_env={"env_vars": engine_environment(setup.config)},
        )
        # Without an EOS: all that is looked at are log-probabilities.
        .remote(config.policy_model, setup, ())
    )
    try:
        completions = ray.get(engine.sample.remote(requests), timeout=rollout.start_timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise TimeoutError(
            f"an engine to compare with gave no answer within {rollout.start_timeout_s:g} s"
            " (rollout.start_timeout_s)"
        ) from error
    finally:
        ray.kill(engine)
    return [
        replace(
            t,
            response_ids=c.token_ids,
            response_logprobs=c.logprobs,
            policy_versions=c.versions,
            finish_reason=c.finish_reason,
        )
        for t, c in zip(trajectories, completions, strict=True)
    ]
