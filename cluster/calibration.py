"""``rlhf bench plan``: the constants of :mod:`cluster.cost_model`, from real steps on this machine.

Small models take real PPO steps through the whole system, each in several workloads that differ in
what dominates: long responses, long prompts, many samples. The constants of a phase are those
that are not negative and have the least squared relative error. Each workload is then predicted by
constants that were fitted without it: that error is stated.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.cost_model import TERMS, Calibration, Layout, StepShape, work, write_calibration

SHAPES: tuple[tuple[int, int], ...] = ((128, 4), (256, 6), (384, 4))
"""Hidden size and layers of the models that are measured."""

WORKLOADS: tuple[tuple[int, int, int], ...] = ((64, 32, 48), (24, 96, 16), (16, 24, 128))
"""Samples of a step, tokens of a prompt, and tokens of a response at most."""

EPOCHS, MINIBATCHES, VOCABULARY = 2, 4, 2048
WARM_UP_STEPS, MEASURED_STEPS = 1, 2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A workload and the seconds that its phases took: the median of its steps."""

    name: str
    step: StepShape
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def phases_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step's metrics by the phases of the model; together they are the step."""
    optimize = metrics["ppo/seconds_optimizer"]
    broadcast = metrics["seconds/broadcast"]
    generate = metrics["seconds/generate"] + metrics.get("seconds/accounting", 0.0)
    return {
        "generate": generate,
        "learn": metrics["seconds/learn"] - optimize,
        "optimize": optimize,
        "broadcast": broadcast,
    }


def median_phases(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = [phases_of(step) for step in steps]
    return {phase: statistics.median(one[phase] for one in found) for phase in TERMS}


def expected_response(longest: int, vocabulary: int = VOCABULARY) -> float:
    """Mean tokens of a response of an untrained model, which ends at any token with probability
    1 / vocabulary, EOS included."""
    ends = 1.0 / vocabulary
    return float((1 - (1 - ends) ** longest) / ends)


def fit(measured: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Constants of every phase, none of them negative, by least squares of relative errors.

    Raises:
        ValueError: There is nothing to fit to.
    """
    from scipy.optimize import nnls

    if not measured:
        raise ValueError("no workload was measured")
    constants = {}
    for phase, terms in TERMS.items():
        amounts = np.array(
            [[work(one.step, Layout())[phase][term] for term in terms] for one in measured]
        )
        seconds = np.array([max(one.seconds[phase], 1e-6) for one in measured])
        relative = amounts / seconds[:, None]
        # Terms differ by ten powers of ten: each is measured in its own largest amount.
        scale = relative.max(axis=0)
        solution, _ = nnls(relative / scale, np.ones(len(measured)), maxiter=10_000)
        constants[phase] = dict(zip(terms, map(float, solution / scale), strict=True))
    return constants


def calibrate(measured: Sequence[Measured], *, device: str, bf16: bool) -> Calibration:
    """The constants, with the error of each workload when it is left out of the fit."""
    errors = []
    for left_out in measured if len(measured) > 2 else ():
        others = [one for one in measured if one is not left_out]
        guess = Calibration(constants=fit(others), device=device, bf16=bf16)
        errors.append(guess.predict(left_out.step).total / left_out.total - 1)
    return Calibration(constants=fit(measured), device=device, bf16=bf16, held_out=tuple(errors))


def measure(
    place: Path,
    shape: tuple[int, int],
    workloads: Sequence[tuple[int, int, int]],
    say: Callable[[str], None],
    *,
    bf16: bool = False,
) -> list[Measured]:
    """Take real PPO steps with a fresh model of ``shape`` (hidden size, layers).

    Engine, learners and reward service have all cores, as in ``rlhf bench ppo``.
    """
    from actors.config import SamplingConfig
    from actors.prompts import PromptStream
    from cluster.bench import bench_config, bench_learners, build_models, random_prompts
    from cluster.memory import model_shape
    from cluster.progress import Reporter
    from cluster.session import Session
    from cluster.stop import StopRequest
    from cluster.train import take_steps

    hidden, layers = shape
    place = place / f"{hidden}x{layers}"
    model, reward_model = build_models(place, hidden=hidden, layers=layers)
    base = bench_config(place, model, reward_model, steps=1000, bf16=bf16)
    assert base.ppo is not None
    ppo = base.ppo.model_copy(update={"epochs": EPOCHS, "minibatches": MINIBATCHES})
    config = base.model_copy(update={"ppo": ppo})
    reporter = Reporter()
    found = []
    with Session(config, reporter, StopRequest(reporter.say)) as session:
        parts = session.parts(
            model, config.reward.terms, lambda: bench_learners(config, model, reward_model)
        )
        for samples, prompt, response in workloads:
            # The learners have moved on: a workload begins with engines that agree with them.
            parts.rollouts.load(parts.learners.export_weights(0, []))
            count = WARM_UP_STEPS + MEASURED_STEPS
            log = take_steps(
                ppo.model_copy(update={"steps": count, "prompts_per_step": samples}),
                SamplingConfig(max_new_tokens=response),
                prompts=PromptStream(random_prompts(samples, prompt), samples, seed=0),
                rollouts=parts.rollouts,
                reward=parts.reward,
                learners=parts.learners,
                seed=0,
                warn=reporter.warn,
            )
            one = Measured(
                name=f"{hidden} wide, {layers} layers, {samples} samples of {prompt}+{response}",
                step=StepShape(
                    model=model_shape(config),
                    samples=samples,
                    prompt_tokens=prompt,
                    response_tokens=expected_response(response),
                    longest_response=response,
                    epochs=EPOCHS,
                    minibatches=MINIBATCHES,
                    sequences_at_once=config.rollout.engine.max_num_seqs,
                    tokens_per_micro_batch=ppo.tokens_per_micro_batch,
                ),
                seconds=median_phases(log.steps[WARM_UP_STEPS:]),
            )
            say(f"{one.name}: {one.total:.2f} s a step")
            found.append(one)
    return found


def bench_plan(
    place: Path,
    path: Path,
    say: Callable[[str], None],
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    bf16: bool = False,
) -> dict[str, Any]:
    """Measure, fit, and write the constants to ``path``; returns what is worth printing.

    Args:
        bf16: Learners compute in bfloat16, as with ``ppo.bf16``.
    """
    measured = [one for s in shapes for one in measure(place, s, WORKLOADS, say, bf16=bf16)]
    calibration = calibrate(measured, device=device_name(), bf16=bf16)
    write_calibration(path, calibration, [asdict(one) for one in measured])
    error = calibration.error
    return {
        "constants": str(path),
        "workloads": len(measured),
        **({} if error is None else {"largest_held_out_error": error}),
        **effective(calibration),
    }


def effective(calibration: Calibration) -> dict[str, float]:
    """The constants as a data sheet would have them; those that do not limit are left out."""
    learn, generate = calibration.constants["learn"], calibration.constants["generate"]
    rates = {
        "learn_gflops": learn["flop"],
        "decode_gflops": generate["flop"],
        "read_gflops": generate["read_flop"],
        "decode_gbytes_per_s": generate["weight_bytes"],
        "broadcast_gbytes_per_s": calibration.constants["broadcast"]["weight_bytes"],
    }
    return {name: 1e-9 / inverse for name, inverse in rates.items() if inverse > 0}


def device_name() -> str:
    """Cores and their model, as far as the system tells."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{len(os.sched_getaffinity(0))} cores, {model}"
