"""``rlhf doctor --drift``: PPO that must change nothing, to prove that everything agrees.

At learning rate zero the policy that samples, the policy that learns and the reference are one
model, so whatever differs is an error or rounding. Real parts run real steps:

* weights: bit-identical before and after, though the optimizers took every step;
* learner: the ratio is exactly 1, its approximate KL and the KL to the reference exactly 0;
* engine: its log-probabilities are the learner's within ``ppo.drift``'s warning thresholds.

Exactly, because the same rows in the same micro-batches go through the same operations. A matrix
product may round otherwise when its shape changes, so these steps have one minibatch an epoch,
which makes every epoch the same micro-batches in another order; the configured minibatches are
tried at the end, and there only the first must be exact. The engine adds in yet another order, so
between engine and learner nothing is exact in floating point.

The engine starts with other weights: a tensor that an update leaves behind shows.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import xxhash
from safetensors.torch import load_file, save_file

from actors.prompts import PromptStream
from actors.rollout import RolloutPool
from actors.trajectory import Prompt
from actors.weights import WeightUpdate, weight_files
from cluster.config import RunConfig
from cluster.drift_blame import Blame, find_culprit
from cluster.drift_watch import FIGURES
from cluster.hub import local_model
from cluster.progress import Reporter
from cluster.session import Session
from cluster.step import Sample
from cluster.stop import StopRequest
from cluster.train import take_steps
from learner.batch import build_batch
from learner.config import DriftConfig, OptimizerConfig, PPOConfig
from learner.group import PPOLearners
from learner.trainer import FIRST_RATIO_TOLERANCE
from reward_service.config import RewardConfig, RewardTerm
from reward_service.rewards import Reward

PROMPTS, SAMPLES = 8, 2
SHARED_PREFIX = 140
"""Tokens that half of the prompts begin with: more than a block of the prefix cache."""

STILL = OptimizerConfig(learning_rate=0.0, schedule="constant")
SILENT = DriftConfig(**dict.fromkeys(DriftConfig.model_fields))


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold: what was measured, and what it must be."""

    what: str
    measured: str
    must_be: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of the gate. ``blame`` is looked for when engine and learner disagree."""

    model: str
    steps: int
    checks: Sequence[Check]
    blame: Blame | None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def run_drift_gate(
    config: RunConfig | None, model: Path | None, *, steps: int, as_json: bool
) -> bool:
    """Run the gate and print its table, or one JSON line; returns whether all checks passed.

    Args:
        config: Whose engine, learner and PPO settings are tried; the defaults without.
        model: What is trained; by default the policy model of ``config``.

    Raises:
        FileNotFoundError, ValueError: There is no model to try, or it cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-drift-") as place:
        tried = gate_config(config, model, steps, Path(place))
        reporter = Reporter()
        with Session(measuring(tried), reporter, StopRequest(reporter.say)) as session:
            reporter.say(f"drift gate: {steps} PPO steps at learning rate 0 on {tried.model}")
            parts = session.parts(
                with_other_weights(tried.policy_model, Path(place)),
                tried.reward.terms,
                lambda: gate_learners(tried),
            )
            verdict, samples = examine_drift(
                tried, parts.rollouts, parts.reward, parts.learners, reporter
            )
            parts.learners.shutdown()
            verdict = replace(verdict, checks=[*verdict.checks, configured(tried, samples)])
    print(json.dumps(asdict(verdict) | {"passed": verdict.passed}) if as_json else table(verdict))
    return verdict.passed


def gate_config(config: RunConfig | None, model: Path | None, steps: int, place: Path) -> RunConfig:
    """``config`` made small and still: the same engine and learners, nothing learned."""
    if model is None and config is None:
        raise ValueError("the drift gate needs a model: give --model DIR, or --config FILE")
    base = config or RunConfig(run_dir=place)
    directory = local_model(str(model or base.policy_model))
    ppo = base.ppo or PPOConfig()
    still = {
        "steps": steps,
        "prompts_per_step": PROMPTS,
        "policy": STILL,
        "critic": STILL,
        "drift": ppo.drift_limits,
        "max_staleness": 0,
        # Every sample is looked at, whatever becomes of it in the run itself.
        "truncated": "score",
        "dynamic_sampling": None,
    }
    return base.model_copy(
        update={
            "run_dir": place,
            "model": str(directory),
            "pretrain": None,
            "sft": None,
            "reward": RewardConfig(
                terms=(RewardTerm(name="cheap", function="reward_service.examples:new_words"),)
            ),
            "sampling": base.sampling.model_copy(
                update={
                    "samples_per_prompt": SAMPLES,
                    "max_new_tokens": min(base.sampling.max_new_tokens, 32),
                }
            ),
            "ppo": ppo.model_copy(update=still),
        }
    )


def measuring(config: RunConfig) -> RunConfig:
    """``config`` with engines that report their probe's error rather than refuse weights."""
    rollout = config.rollout.model_copy(update={"probe_tolerance": math.inf})
    return config.model_copy(update={"rollout": rollout})


def gate_learners(config: RunConfig, *, minibatches: int = 1) -> PPOLearners:
    assert config.ppo is not None
    return PPOLearners(
        config.ppo.model_copy(update={"minibatches": minibatches}),
        config.learners,
        policy_dir=config.policy_model,
        reference_dir=config.policy_model,
        critic_dir=None,
        temperature=config.sampling.temperature,
        total_steps=config.ppo.steps,
        seed=config.seed,
    )


def examine_drift(
    config: RunConfig,
    rollouts: RolloutPool,
    reward: Reward,
    learners: PPOLearners,
    reporter: Reporter,
) -> tuple[Verdict, list[Sample]]:
    """Take the steps, check what they report, and look for the culprit of a disagreement.

    Args:
        rollouts: Of a configuration that is :func:`measuring`, started with other weights.
        learners: Made by :func:`gate_learners`.

    Returns:
        The verdict, and the samples of the last step.
    """
    ppo = config.ppo
    assert ppo is not None
    prompts = gate_prompts(config, rollouts.context_length)
    before = learners.export_weights(0, [])
    rollouts.load(before)
    log = take_steps(
        # Nothing is stopped or warned of here: the checks below tell.
        ppo.model_copy(update={"minibatches": 1, "drift": SILENT}),
        config.sampling,
        prompts=PromptStream(prompts, PROMPTS, config.seed),
        rollouts=rollouts,
        reward=reward,
        learners=learners,
        seed=config.seed,
        warn=reporter.warn,
    )
    checks = [
        same_weights(before, learners.export_weights(0, [])),
        *exact_in_the_learner(log.steps),
        *engine_agreement(log.steps, ppo.drift_limits),
        probe_agreement(log.steps, config.rollout.probe_tolerance),
    ]
    blame = None
    if not all(check.passed for check in checks[-len(FIGURES) - 1 :]):
        reporter.say("engine and learner disagree: trying one setting after the other")
        trajectories = [sample.trajectory for sample in log.samples]
        rollouts.shutdown()  # makes room for other engines
        measured = max(step["ppo/engine_delta_mean"] for step in log.steps)
        blame = find_culprit(config, trajectories, learners, reporter.say, measured=measured)
    verdict = Verdict(model=str(config.model), steps=len(log.steps), checks=checks, blame=blame)
    return verdict, log.samples


def configured(config: RunConfig, samples: Sequence[Sample]) -> Check:
    """The configured minibatches, whose later epochs cut the rows otherwise: rounding only."""
    assert config.ppo is not None
    batch = build_batch([s.trajectory for s in samples], [s.score for s in samples], config.ppo)
    with gate_learners(config, minibatches=config.ppo.minibatches) as learners:
        metrics = learners.update(batch)
    tolerance = FIRST_RATIO_TOLERANCE[config.ppo.bf16]
    first, worst = metrics["ppo/first_log_ratio_max"], metrics["ppo/log_ratio_max"]
    return Check(
        what=f"largest |log ratio|, {config.ppo.minibatches} minibatches",
        measured=f"{worst:.3g}, in the first {first:.3g}",
        must_be=f"<= {tolerance:g}, in the first 0 exactly",
        passed=worst <= tolerance and first == 0.0,
    )


def gate_prompts(config: RunConfig, context: int) -> list[Prompt]:
    """Random ids: half begin alike, to meet the prefix cache, and half are short and uneven."""
    rng = np.random.default_rng(config.seed)
    settings = json.loads((config.policy_model / "config.json").read_text(encoding="utf-8"))
    vocabulary = int(settings.get("vocab_size") or settings["text_config"]["vocab_size"])
    room = context - config.sampling.max_new_tokens - 1
    if room < 2:
        raise ValueError(
            f"a context of {context} tokens has no room for a prompt and"
            f" {config.sampling.max_new_tokens} new tokens: lower sampling.max_new_tokens"
        )
    shared = rng.integers(0, vocabulary, min(SHARED_PREFIX, room - 1))
    prompts = []
    for i in range(PROMPTS):
        own = rng.integers(0, vocabulary, int(rng.integers(1, 40)))
        ids = np.concatenate([shared, own]) if i % 2 else own
        prompts.append(
            Prompt(prompt_id=f"drift:{i}", token_ids=ids[:room].astype(np.int32), text="")
        )
    return prompts


def with_other_weights(model: Path, place: Path) -> Path:
    """A copy of a model's directory in ``place``, every weight halved."""
    other = place / "other_weights"
    shutil.copytree(model, other)
    for path in weight_files(other):
        halved = {name: tensor * 0.5 for name, tensor in load_file(path).items()}
        save_file(halved, path, metadata={"format": "pt"})
    return other


def weights_hash(update: WeightUpdate) -> str:
    """One number for all tensors: XXH3-128 of their names, dtypes, shapes and checksums."""
    digest = xxhash.xxh3_128()
    for name in sorted(update.manifest):
        digest.update(repr((name, update.manifest[name])).encode())
    return str(digest.hexdigest())


def same_weights(before: WeightUpdate, after: WeightUpdate) -> Check:
    changed = [n for n, info in before.manifest.items() if after.manifest.get(n) != info]
    measured = weights_hash(after)
    if changed:
        measured += f" ({len(changed)} of {len(before.manifest)} tensors, first {changed[0]!r})"
    return Check(
        what="policy weights, hash",
        measured=measured,
        must_be=weights_hash(before),
        passed=not changed and before.manifest.keys() == after.manifest.keys(),
    )


def exact_in_the_learner(steps: Sequence[Mapping[str, float]]) -> list[Check]:
    """What must be exactly 0 in every step, over all tokens and epochs."""
    figures = {
        "largest |log ratio|, all epochs": ("ppo/log_ratio_max",),
        "approximate KL of the update": ("ppo/approx_kl",),
        "clipped tokens": ("ppo/clip_fraction",),
        "KL to the reference": ("ppo/kl_sequence", "ppo/kl_token"),
    }
    checks = []
    for what, names in figures.items():
        worst = max(abs(step[name]) for step in steps for name in names)
        checks.append(
            Check(what=what, measured=f"{worst:.3g}", must_be="0 exactly", passed=worst == 0.0)
        )
    return checks


def engine_agreement(steps: Sequence[Mapping[str, float]], limits: DriftConfig) -> list[Check]:
    """Engine against learner, the worst of all steps."""
    checks = []
    for figure in FIGURES:
        values = [step[figure.metric] for step in steps]
        worst = max(values) if figure.small_is_good else min(values)
        limit: float | None = getattr(limits, f"warn_{figure.setting}")
        sign = "<=" if figure.small_is_good else ">="
        checks.append(
            Check(
                what=f"engine: {figure.words}",
                measured=f"{worst:.6g}",
                must_be="(no limit)" if limit is None else f"{sign} {limit:g}",
                passed=limit is None or figure.within(worst, limit),
            )
        )
    return checks


def probe_agreement(steps: Sequence[Mapping[str, float]], tolerance: float) -> Check:
    worst = max(step["weights/probe_error_max"] for step in steps)
    return Check(
        what="engine: probe after each update",
        measured=f"{worst:.3g}",
        must_be=f"<= {tolerance:g}",
        passed=worst <= tolerance,
    )


def table(verdict: Verdict) -> str:
    """The checks as aligned lines, then what is to blame."""
    wide = max(len(check.what) for check in verdict.checks)
    lines = []
    for check in verdict.checks:
        sign = "ok     " if check.passed else "FAILED "
        what = f"{check.what:<{wide}}"
        lines.append(f"{sign} {what}  {check.measured}  (must be {check.must_be})")
    if verdict.blame is not None:
        lines += ["", str(verdict.blame)]
    lines += ["", "No drift." if verdict.passed else "Drift: do not train with this."]
    return "\n".join(lines)
