"""``rlhf doctor`` and ``rlhf bench``: what this machine can do. Heavy imports wait."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cluster.config import RunConfig


@click.command("doctor")
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path),
    help="Also check what this configuration needs; with --drift, try its engine and learners.",
)
@click.option(
    "--drift", is_flag=True, help="Run the drift gate instead: PPO that must change nothing."
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="With --drift: the model to try; default: the policy model of --config.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="With --drift: PPO steps to take.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="With --drift: one JSON line on standard output."
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def doctor(
    config: Path | None,
    drift: bool,
    model: Path | None,
    steps: int,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Say whether this machine can run it: packages, cores, memory, ports, accelerators.

    With a configuration it also estimates the memory that its processes will need at their peak.

    With --drift it proves instead that the parts agree: real PPO steps at learning rate zero must
    leave the policy bit-identical, with the ratio at exactly 1 and the KL at exactly 0, and the
    engine's log-probabilities must be the learner's. If they are not, one setting after the other
    is changed, and the one that is to blame is named.

    \b
    rlhf doctor --drift --model runs/quickstart/sft
    rlhf doctor --drift --config my.yaml rollout.engine.dtype=bfloat16

    Exit status 1 when something must be mended first.
    """
    loaded: RunConfig | None = None
    if not drift and (model is not None or as_json):
        raise click.UsageError("--model and --json belong to --drift")
    if config is not None:
        from cluster.config import load_config

        loaded = load_config(config, overrides)
    if drift:
        from cluster.drift import run_drift_gate

        sys.exit(0 if run_drift_gate(loaded, model, steps=steps, as_json=as_json) else 1)
    from cluster.doctor import examine, print_findings

    sys.exit(0 if print_findings(examine(loaded)) else 1)


@click.command("bench")
@click.argument("what", type=click.Choice(["ppo", "overlap", "weights", "start", "reward", "plan"]))
@click.option("--json", "as_json", is_flag=True, help="Only one JSON line on standard output.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Of plan: where the constants go; default ~/.cache/rlhf/calibration.json.",
)
@click.option("--bf16", is_flag=True, help="Of plan: for runs with ppo.bf16.")
def bench(what: str, as_json: bool, repeats: int, output: Path | None, bf16: bool) -> None:
    """Measure this system against its own floor, in one run.

    \b
    rlhf bench ppo --json
    rlhf bench plan

    \b
    ppo      one PPO iteration / bare vLLM generation + bare torch learning
    overlap  a step that generates the next one meanwhile / one that does not
    weights  one verified weight update / copying the same bytes
    start    from the start of a PPO run to its first finished sample
    reward   scoring over HTTP / bare torch on the same batch, and 32 callers at once
    plan     the constants of this machine for `rlhf plan`, from real steps of small models
    """
    if what != "plan" and (output is not None or bf16):
        raise click.UsageError("--output and --bf16 belong to plan")
    from cluster.bench import run_benchmark

    run_benchmark(what, as_json=as_json, repeats=repeats, constants=output, bf16=bf16)
