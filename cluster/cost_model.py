"""Seconds of a PPO step from a few constants of a machine. docs/plan.md says what is assumed.

A phase of a step takes the sum of its terms, and a term is an amount of work (:func:`work`) times
a constant of the machine::

    generate = fixed + layer calls x t + bytes of weights / B + FLOP of decoding / F
                     + FLOP of reading prompts and scoring / F' + sampled tokens x t'
    learn    = fixed + FLOP / F + activations / B + layer calls x t
    optimize = parameters stepped / B
    broadcast = fixed + bytes of weights / B

The constants are the inverses of what one would read in a data sheet, times how much of it is
reached, so that every phase is linear in them and they are found by least squares
(:mod:`cluster.calibration`). A constant that is 0 does not limit the machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.memory import ModelShape
from cluster.whole_file import replace_text

FORMAT = 1
TERMS: dict[str, tuple[str, ...]] = {
    "generate": ("fixed", "layer_calls", "weight_bytes", "flop", "read_flop", "tokens"),
    "learn": ("fixed", "flop", "activations", "layer_calls"),
    "optimize": ("parameter_steps",),
    "broadcast": ("fixed", "weight_bytes"),
}
"""Every phase with its terms, in the order of the constants."""

MEANINGS: dict[str, str] = {
    "fixed": "seconds, whatever the work",
    "layer_calls": "seconds to call one layer once, beside its arithmetic",
    "weight_bytes": "seconds a byte of weights",
    "flop": "seconds a floating-point operation",
    "read_flop": "seconds an operation of reading prompts and of scoring",
    "tokens": "seconds a sampled token, beside its arithmetic",
    "activations": "seconds an element of the hidden states, a layer and a pass",
    "parameter_steps": "seconds a parameter and an optimizer step",
}


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step has to do, on which model.

    Attributes:
        samples: Of a step, in all.
        prompt_tokens, response_tokens: Mean of a sample.
        longest_response: Tokens at which sampling stops.
        trained_models: Models with a gradient: policy and, with a critic, the critic.
        read_models: Models that only annotate the batch: the reference.
        scored: Whether a reward model of the policy's size reads every sample.
        weight_bytes_each: Bytes of a parameter in the engine.
        sequences_at_once: That one engine decodes.
        tokens_per_micro_batch: Padded tokens that a learner holds at once.
    """

    model: ModelShape
    samples: int
    prompt_tokens: float
    response_tokens: float
    longest_response: int
    epochs: int
    minibatches: int
    trained_models: int = 2
    read_models: int = 1
    scored: bool = True
    weight_bytes_each: int = 4
    sequences_at_once: int = 64
    tokens_per_micro_batch: int = 8192

    @property
    def tokens(self) -> float:
        """Of prompts and responses of a step."""
        return self.samples * (self.prompt_tokens + self.response_tokens)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the processes of a run lie on devices: machines without accelerators, or accelerators.

    Attributes:
        engines, learners: Processes of each kind, one a device at most.
        engines_per_device: Engines that share one device's compute (several on one machine).
        network_bytes_per_s: Between two devices; the exchange of gradients and of weights.
    """

    engines: int = 1
    learners: int = 1
    engines_per_device: int = 1
    network_bytes_per_s: float = 1.25e9


def forward_flop(model: ModelShape, tokens: float, context: float, predicted: float) -> float:
    """Floating-point operations of a forward pass over ``tokens``.

    Two for each parameter of the layers and token; for attention, two products of the hidden size
    with, on average, half the context; and the output head where something is predicted
    (Kaplan et al., arXiv 2001.08361, section 2.1).
    """
    attention = 2 * model.hidden_size * context * model.layers
    head = 2 * model.hidden_size * model.vocab_size
    return tokens * (2 * model.body_parameters + attention) + predicted * head


def work(step: StepShape, layout: Layout) -> dict[str, dict[str, float]]:
    """Amount of work of every term, for the process of a kind that has most of it."""
    return {
        "generate": _generation(step, layout),
        "learn": _learning(step, layout),
        "optimize": {
            "parameter_steps": step.model.parameters
            * step.trained_models
            * step.epochs
            * min(step.minibatches, step.samples)
        },
        "broadcast": {"fixed": 1.0, "weight_bytes": step.model.parameters * step.weight_bytes_each},
    }


def _generation(step: StepShape, layout: Layout) -> dict[str, float]:
    """One engine's part; with several on one device, that of all of them where they share it."""
    model = step.model
    share = math.ceil(step.samples / layout.engines)
    tokens = share * step.response_tokens
    # Whoever is finished is replaced at once; the last to be taken in may be the longest.
    waves_before = (share - 1) // step.sequences_at_once
    passes = waves_before * step.response_tokens + step.longest_response
    context = step.prompt_tokens + step.response_tokens
    decoded = forward_flop(model, tokens, 2 * step.prompt_tokens + step.response_tokens, tokens)
    read = forward_flop(model, share * step.prompt_tokens, step.prompt_tokens, share)
    if step.scored:
        read += forward_flop(model, share * context, context, 0)
    together = layout.engines_per_device
    return {
        "fixed": 1.0,
        "layer_calls": passes * model.layers,
        "weight_bytes": passes * model.parameters * step.weight_bytes_each * together,
        "flop": decoded * together,
        "read_flop": read * together,
        "tokens": tokens * together,
    }


def _learning(step: StepShape, layout: Layout) -> dict[str, float]:
    """One learner's part. A backward pass costs twice its forward pass."""
    model, learners = step.model, layout.learners
    length = step.prompt_tokens + step.response_tokens
    tokens = step.tokens / learners
    predicted = step.samples * step.response_tokens / learners
    body = forward_flop(model, tokens, length, 0)
    head = forward_flop(model, 0, 0, predicted)
    # A critic has no output head; policy and reference models have.
    with_head = 1 + step.read_models + 3 * step.epochs
    passes = (step.trained_models + step.read_models) + 3 * step.epochs * step.trained_models
    minibatches = min(step.minibatches, step.samples)
    micro = minibatches * max(1, math.ceil(tokens / minibatches / step.tokens_per_micro_batch))
    return {
        "fixed": 1.0,
        "flop": passes * body + with_head * head,
        "activations": passes * tokens * model.hidden_size * model.layers,
        "layer_calls": passes * micro * model.layers,
    }


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a step by phase, and of each phase by term."""

    phases: Mapping[str, Mapping[str, float]]

    def seconds(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def total(self) -> float:
        """One phase after the other."""
        return sum(self.seconds(phase) for phase in self.phases)

    @property
    def overlapped(self) -> float:
        """With generation beside learning (``ppo.max_staleness`` 1), on devices apart."""
        beside = self.seconds("generate"), self.seconds("learn") + self.seconds("optimize")
        return self.total - min(beside)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The constants of a machine, where they come from, and how far off they are.

    Attributes:
        constants: For each phase the constants of its terms, in seconds per unit of work.
        device: What was measured.
        bf16: Whether the learners computed in bfloat16.
        held_out: Relative error of a step's predicted time for each measured workload, when the
            constants are fitted to all the others.
    """

    constants: Mapping[str, Mapping[str, float]]
    device: str
    bf16: bool
    held_out: tuple[float, ...] = ()

    @property
    def error(self) -> float | None:
        """Largest relative error of a workload that the constants have not seen."""
        return max(map(abs, self.held_out)) if self.held_out else None

    def predict(self, step: StepShape, layout: Layout | None = None) -> Prediction:
        """Seconds of one step, without checkpoints."""
        layout = layout or Layout()
        phases: dict[str, dict[str, float]] = {}
        for phase, amounts in work(step, layout).items():
            constants = self.constants[phase]
            phases[phase] = {term: constants[term] * amount for term, amount in amounts.items()}
        phases["exchange"] = exchange(step, layout)
        return Prediction(phases=phases)


def exchange(step: StepShape, layout: Layout) -> dict[str, float]:
    """Seconds on the network, which one machine alone does not use.

    Gradients: a ring moves twice their bytes past every learner in each optimizer step. Weights:
    each engine that has them passes them on, so their way is a binary tree.
    """
    gradients = 4.0 * step.model.parameters * step.trained_models
    steps = step.epochs * min(step.minibatches, step.samples)
    ring = 2 * (layout.learners - 1) / layout.learners * gradients * steps
    weights = step.model.parameters * step.weight_bytes_each
    hops = math.ceil(math.log2(layout.engines)) if layout.engines > 1 else 0
    return {
        "gradients": ring / layout.network_bytes_per_s,
        "weights": hops * weights / layout.network_bytes_per_s,
    }


def default_path() -> Path:
    """Where ``rlhf bench plan`` leaves its constants."""
    return Path("~/.cache/rlhf/calibration.json").expanduser()


def read_calibration(path: Path) -> Calibration:
    """Constants that ``rlhf bench plan`` wrote.

    Raises:
        FileNotFoundError: There are none.
        ValueError: It is no such file, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no constants of this machine at {path}: measure them with `rlhf bench plan`, which"
            " takes some minutes on a quiet machine, or give a file with --calibration"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']}, this version reads {FORMAT}")
        constants = {
            phase: {term: float(values["constants"][phase][term]) for term in terms}
            for phase, terms in TERMS.items()
        }
        return Calibration(
            constants=constants,
            device=str(values["device"]),
            bf16=bool(values["bf16"]),
            held_out=tuple(map(float, values["held_out"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no constants ({error}): write it anew with `rlhf bench plan`"
        ) from None


def write_calibration(path: Path, calibration: Calibration, measured: Any) -> None:
    """Replace the file; ``measured`` goes along, so that the fit can be checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, **asdict(calibration), "measured": measured}
    replace_text(path, json.dumps(values, indent=1))
