"""``rlhf plan``: its options. Heavy imports wait until the arguments have been understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("plan")
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path),
    help="YAML file of the run; default: the quickstart's settings.",
)
@click.option(
    "--model", type=click.Path(path_type=Path), help="Plan for this Hugging Face directory."
)
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--memory-gib", type=click.FloatRange(min=0, min_open=True), help="Of a node; default: of this."
)
@click.option(
    "--gpu-memory-gib",
    type=click.FloatRange(min=0, min_open=True),
    default=80.0,
    show_default=True,
)
@click.option(
    "--network-gbit",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Between two nodes.",
)
@click.option(
    "--prompt-tokens",
    type=click.FloatRange(min=1),
    help="Mean of a prompt; default: data.max_prompt_tokens.",
)
@click.option(
    "--response-tokens",
    type=click.FloatRange(min=1),
    help="Mean of a response; default: sampling.max_new_tokens.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Constants of `rlhf bench plan`; default ~/.cache/rlhf/calibration.json.",
)
@click.option(
    "--simulate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead: simulate clusters of up to --nodes nodes (8192 when it is 1) and draw FILE"
    " (.svg or .png).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def plan(simulate: Path | None, nodes: int, **options: Any) -> None:
    """Say before a run what it needs: memory, whether it fits, seconds per step, placement.

    Memory comes from the model's shape. Seconds come from constants that `rlhf bench plan`
    measures on the machine, and their error is stated; without constants there are none. A shape
    can be given without a model, by the settings of pretrain.

    \b
    rlhf plan --config mine.yaml
    rlhf plan --model /models/my-7b --nodes 4 --gpus-per-node 8
    rlhf plan pretrain.hidden_size=512 pretrain.layers=8 ppo.prompts_per_step=128
    rlhf plan --simulate scaling.svg

    docs/plan.md says what is assumed.
    """
    if simulate is not None:
        from cluster import scaling
        from cluster.scaling_plot import plot_scaling

        largest = nodes if nodes >= 8 else 8192
        simulated = scaling.simulate(scaling.Assumptions(), scaling.default_nodes(largest))
        plot_scaling(simulated, simulate)
        click.echo(scaling.describe(simulated))
        return
    from cluster import plan_text
    from cluster.plan import plan_from_options

    as_json = options.pop("as_json")
    found = plan_from_options(nodes=nodes, **options)
    click.echo(plan_text.as_json(found) if as_json else plan_text.describe(found))
