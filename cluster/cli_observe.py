"""``rlhf status`` and ``rlhf timeline``: look at a run from its directory. Heavy imports wait."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("status")
@click.argument(
    "run_dir", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option("--watch", is_flag=True, help="Show it again and again until the run has ended.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.5),
    default=5.0,
    show_default=True,
    help="With --watch: seconds between two looks.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each look.")
def status(run_dir: Path | None, watch: bool, every: float, as_json: bool) -> None:
    """Say what a run is doing: stage, step, time left, health, workers, last checkpoint.

    Reads only the run directory, by default the newest in runs/, so it works on any machine that
    sees it, and on a run that has ended. It says whether the process lives: one that holds the
    directory gives a sign of life there every ten seconds.

    \b
    rlhf status
    rlhf status runs/quickstart --watch
    rlhf status runs/quickstart --json | jq .seconds_left
    """
    from cluster import status as looking
    from cluster import status_text

    def show(found: looking.RunStatus) -> None:
        if watch and not as_json:
            click.clear()
        click.echo(status_text.as_json(found) if as_json else status_text.describe(found))

    chosen = run_dir or looking.find_run()
    if watch:
        looking.watch(chosen, show, every_s=every)
    else:
        show(looking.read_status(chosen))


@click.command("timeline")
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
def timeline(run_dir: Path) -> None:
    """Write the timeline of a run's PPO steps as a Chrome trace on standard output.

    One line a worker: what it was busy with, and where it waited. Open the file at
    https://ui.perfetto.dev or in chrome://tracing. The report shows the last steps by itself.

    \b
    rlhf timeline runs/quickstart > trace.json
    """
    from cluster.timeline import export_trace

    export_trace(run_dir, click.echo)
