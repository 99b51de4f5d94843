"""A plan as a person or a program reads it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from cluster.cost_model import Prediction
from cluster.plan import USABLE, Plan


def describe(plan: Plan) -> str:
    """The plan for a person."""
    model, step, cluster = plan.model, plan.step, plan.cluster
    kind = "accelerators" if cluster.gpus_per_node else "machines"
    lines = [
        f"model: {model.parameters / 1e6:.4g} M parameters, {model.layers} layers of"
        f" {model.hidden_size}, vocabulary {model.vocab_size}",
        f"step: {step.samples} samples of {step.prompt_tokens:g} + {step.response_tokens:g} tokens,"
        f" {step.epochs} epochs of {step.minibatches} minibatches",
        f"cluster: {cluster.devices} {kind} with {cluster.device_gib:.4g} GiB",
        "",
        "memory of one process, GiB",
    ]
    for one in plan.processes:
        device = f", accelerator {one.device_gib:.3g}" if one.device_gib else ""
        lines.append(f"  {one.kind:<18}{one.count:>3} x {one.host_gib:.3g}{device}")
    verdict = "fits" if plan.configured.fits else "DOES NOT FIT"
    lines.append(
        f"as configured ({plan.configured.describe()}): {plan.configured.used_gib:.3g} of"
        f" {cluster.device_gib:.4g} GiB on the fullest, {verdict}"
    )
    if plan.prediction is not None:
        lines += ["", *_seconds(plan.prediction, plan.configured.seconds, plan.error)]
    lines += ["", "placement"]
    suggested = plan.suggested
    for way in plan.placements[:4]:
        mark = "->" if way is suggested else "  "
        seconds = "" if way.seconds is None else f", {way.seconds:.3g} s a step"
        fits = f"{way.used_gib:.3g} GiB" + ("" if way.fits else ", does not fit")
        lines.append(f"{mark} {way.describe()}: {fits}{seconds}")
    if suggested is None:
        lines.append(
            f"nothing fits into {USABLE:.0%} of {cluster.device_gib:.4g} GiB: smaller"
            " ppo.tokens_per_micro_batch, an estimator without a critic, or larger devices"
        )
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _seconds(prediction: Prediction, total: float | None, error: float | None) -> list[str]:
    known = "" if error is None else f", give or take {error:.0%}"
    beside = "" if total == prediction.total else "; generate beside learn and optimize"
    lines = [f"seconds of a step as configured: {total:.3g}{known}{beside}"]
    for phase, terms in prediction.phases.items():
        seconds = prediction.seconds(phase)
        if seconds < 0.001 * prediction.total:
            continue
        largest = sorted(terms.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(
            f"{name.replace('_', ' ')} {s:.3g}" for name, s in largest if s > 0.01 * seconds
        )
        lines.append(f"  {phase:<11}{seconds:>8.3g}  {seconds / prediction.total:>4.0%}  ({parts})")
    return lines


def as_json(plan: Plan) -> str:
    """The plan as one line."""
    suggested = plan.suggested
    values: dict[str, Any] = {
        **asdict(plan),
        "suggested": None if suggested is None else asdict(suggested),
        "seconds": plan.configured.seconds,
    }
    return json.dumps(values)
